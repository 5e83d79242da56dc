"""The demo's promise, kept by training it: DolphinFlow learns to add where AdamW only remembers."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from trysquare_conformance.demo import RUNS, DemoResult, Run, initial_weights, logits, modular_addition, run_demo

ADAMW, DOLPHINFLOW = RUNS[0], RUNS[2]
PICTURE, NUMBERS = "demo.png", "demo.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def console() -> Console:
    return Console(record=True, width=100)


@pytest.fixture(scope="module")
def result(folder: Path, console: Console) -> DemoResult:
    """The whole training of the two runs that are compared."""
    files = {"picture": folder / PICTURE, "json": folder / NUMBERS}
    return run_demo(runs=(ADAMW, DOLPHINFLOW), console=console, **files)


def test_dolphinflow_generalises_and_adamw_memorises(result: DemoResult) -> None:
    adamw, dolphinflow = result.runs
    assert (adamw.run.loss, dolphinflow.run.loss) == ("softmax", "softmax")
    assert adamw.train_accuracy[-1] == dolphinflow.train_accuracy[-1] == 1
    assert dolphinflow.final >= 0.99
    assert adamw.final < 0.05


def test_the_table_prints_what_was_reached(result: DemoResult, console: Console) -> None:
    printed = console.export_text(clear=False)
    for one in result.runs:
        (line,) = [
            row
            for row in printed.splitlines()
            if row.startswith(one.run.optimizer) and "softmax " in row and "%" in row
        ]
        assert f"{100 * one.final:.1f} %" in line


def test_the_picture_is_drawn_the_same_every_time(result: DemoResult, folder: Path) -> None:
    from trysquare_conformance.demo import draw

    for suffix in (".png", ".svg"):
        draw(result, folder / f"one{suffix}")
        draw(result, folder / f"two{suffix}")
        assert (folder / f"one{suffix}").read_bytes() == (folder / f"two{suffix}").read_bytes()
    assert (folder / PICTURE).read_bytes() == (folder / "one.png").read_bytes()


def test_the_file_holds_the_result_and_where_it_came_from(result: DemoResult, folder: Path) -> None:
    content = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
    assert [row["final"] for row in content["runs"]] == [one.final for one in result.runs]
    assert content["machine"]["torch"] == torch.__version__
    assert content["command"].startswith("trysquare demo")


def test_the_first_layer_is_the_product_with_one_hot_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    task, weights = modular_addition(generator), [w.double() for w in initial_weights(generator)]
    one_hot = torch.nn.functional.one_hot(task.columns, 226).sum(1).double()
    assert torch.equal(one_hot.sum(1), torch.full((113 * 113,), 2.0, dtype=torch.float64))
    first, second, third = weights
    expected = ((one_hot @ first.T).relu() @ second.T).relu() @ third.T
    assert torch.equal(logits(weights, task.columns).argmax(1), expected.argmax(1))


def test_a_pair_is_trained_or_tested_and_never_both() -> None:
    task = modular_addition(torch.Generator().manual_seed(1))
    assert sorted([*task.trained.tolist(), *task.tested.tolist()]) == list(range(113 * 113))
    assert len(task.trained) == 5107


def test_no_epochs_is_an_error() -> None:
    with pytest.raises(ValueError, match="epochs=0"):
        run_demo(epochs=0, runs=(Run("AdamW", "softmax", 1e-2),))
