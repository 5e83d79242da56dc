"""The comparisons of `trysquare demo thorn` and `digits`, run tiny: everyone learns, and what is shown is true."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from trysquare_conformance.cli import app
from trysquare_conformance.demo import comparison, training
from trysquare_conformance.demo.comparison import CONTENDERS, compare
from trysquare_conformance.demo.digits import Digits
from trysquare_conformance.demo.text import LONG, SHORT, Text, characters, source_files
from trysquare_conformance.demo.training import Contender, averaged, spread, train

TINY = Text(width=32, layers=1, length=16, batch=8)
STEPS = 40
ABLE = [one for one in CONTENDERS if one.missing is None]
needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="scikit-learn, the extra `digits`, is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def console() -> Console:
    return Console(record=True, width=100)


@pytest.fixture(scope="module")
def result(folder: Path, console: Console) -> dict[str, Any]:
    return compare(TINY, STEPS, 2, "a command", folder / "one.png", folder / "one.json", console)


def test_every_contender_learns_from_every_seed(result: dict[str, Any]) -> None:
    assert len(result["curves"]) == 2 * len(ABLE)
    for curve in result["curves"]:
        assert curve["loss"][-1] < curve["loss"][0]
        assert len(curve["steps"]) == len(curve["loss"]) == len(curve["accuracy"])
        assert curve["steps"][-1] == STEPS


def test_only_schedule_free_thorn_has_averaged_weights(result: dict[str, Any]) -> None:
    assert [row["contender"] for row in result["rows"] if row["weights"] == "averaged"] == ["THORN"]
    for curve in result["curves"]:
        assert bool(curve["averaged_loss"]) is (curve["contender"] == "THORN")


def test_the_table_the_picture_and_the_file_are_of_this_result(
    result: dict[str, Any], console: Console, folder: Path
) -> None:
    printed = console.export_text(clear=False)
    for row in result["rows"]:
        assert spread(row["loss"], 3) in printed
    assert json.loads((folder / "one.json").read_text()) == json.loads(json.dumps(result))
    comparison.draw(result, folder / "two.png")
    assert (folder / "one.png").read_bytes() == (folder / "two.png").read_bytes()


def test_all_see_the_same_weights_and_batches() -> None:
    seen: list[torch.Tensor] = []

    def build(model: nn.Module) -> list[torch.optim.Optimizer]:
        seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return []

    first, second = (train(TINY, Contender(name, build), 3, 2, lambda: None) for name in "ab")
    assert torch.equal(*seen)
    assert first.loss == second.loss


def test_thorn_is_given_what_adamw_has() -> None:
    model = TINY.model(0)
    built = {one.name: one.build(model) for one in ABLE}
    groups = [group for optimizers in built.values() for one in optimizers for group in one.param_groups]
    assert {group["lr"] for group in groups} == {comparison.LR}
    assert {group["weight_decay"] for group in groups} == {comparison.WEIGHT_DECAY}
    assert {group["betas"] for group in groups if "betas" in group} == {comparison.BETAS}
    for optimizers in built.values():
        stepped = [p for one in optimizers for group in one.param_groups for p in group["params"]]
        assert len(stepped) == len({id(p) for p in stepped}) == len(list(model.parameters()))
    assert averaged(built["AdamW"]) is None


def test_the_text_is_the_library_of_this_python_and_nothing_is_in_both_parts() -> None:
    files = source_files()
    assert "argparse.py" in {path.name for path in files}
    trained, held_out = TINY.sources
    assert len(trained) > 5 * len(held_out) > 10**6
    assert int(trained.max()) < 128


def test_characters_beyond_ascii_are_question_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.py"
    page.write_text("a é", encoding="utf-8")
    assert bytes(characters([page], 100).tolist()) == b"a ??"


@pytest.mark.parametrize(("task", "low", "high"), [(SHORT, 1e6, 2e6), (LONG, 2e6, 3e6)])
def test_the_models_have_one_to_three_million_parameters(task: Text, low: float, high: float) -> None:
    assert low < sum(p.numel() for p in task.model(0).parameters()) < high


@needs_digits
def test_the_convolutional_network_learns_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """THORN later than AdamW: its matrices move by a fifth of AdamW's lr a step. Only the end of each curve counts."""
    monkeypatch.setattr(training, "EVALUATIONS", 1)
    result = compare(Digits(), 60, 1, "a command", console=Console(quiet=True))
    for row in result["rows"]:
        assert row["accuracy"][0] > 0.5


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    outcome = CliRunner().invoke(app, ["demo", "digits", "--steps", "1"])
    assert outcome.exit_code != 0
    assert "digits" in outcome.output
    assert "scikit-learn" in outcome.output


def test_the_command_trains_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trysquare_conformance.demo.text.SHORT", TINY)
    target = tmp_path / "thorn.json"
    outcome = CliRunner().invoke(app, ["demo", "thorn", "--steps", "2", "--seeds", "1", "--json", str(target)])
    assert outcome.exit_code == 0, outcome.output
    written = json.loads(target.read_text())
    assert written["command"] == "trysquare demo thorn --steps 2 --seeds 1 --device cpu"
    assert str(tmp_path) not in target.read_text()
