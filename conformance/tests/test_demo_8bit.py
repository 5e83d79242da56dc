"""`trysquare demo eightbit`, run tiny: both optimizers learn the same tasks, and the memory told is what they take."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from trysquare_conformance.cli import app
from trysquare_conformance.demo import eightbit
from trysquare_conformance.demo.addition import MODULUS, Addition
from trysquare_conformance.demo.eightbit import RIVALS, Experiment, compare
from trysquare_conformance.demo.text import Text
from trysquare_conformance.demo.training import spread

TINY = Text(width=96, layers=1, length=16, batch=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eightbit")


@pytest.fixture(scope="module")
def console() -> Console:
    return Console(record=True, width=150)


@pytest.fixture(scope="module")
def result(folder: Path, console: Console) -> dict[str, Any]:
    chosen = Experiment(Addition(), 1, 1e-3), Experiment(TINY, 40, 1e-3)
    return compare(chosen, 2, "a command", folder / "one.png", folder / "one.json", console)


def test_every_rival_learns_the_text_from_every_seed(result: dict[str, Any]) -> None:
    addition, text = result["experiments"]
    assert len(addition["curves"]) == len(text["curves"]) == 2 * len(RIVALS)
    assert all(curve["loss"][-1] < curve["loss"][0] for curve in text["curves"])


def test_the_memory_is_told_beside_the_learning_rate(result: dict[str, Any]) -> None:
    """The scratch is that of a second step: the first one makes the state as well."""
    for experiment, task in zip(result["experiments"], (Addition(), TINY), strict=True):
        whole, same, tenfold, uncoded = experiment["rows"]
        assert [row["lr"] for row in (whole, same, tenfold, uncoded)] == [1e-3, 1e-3, 1e-2, 1e-2]
        assert uncoded["state_bytes"] == whole["state_bytes"]
        sizes = [p.numel() for p in task.model(0).parameters()]
        assert whole["state_bytes"] == sum(8 * size + 8 for size in sizes)
        assert same["state_bytes"] == tenfold["state_bytes"] < 0.27 * whole["state_bytes"]
        assert 0 < whole["peak_bytes"] < whole["state_bytes"]


def test_the_table_the_picture_and_the_file_are_of_this_result(
    result: dict[str, Any], console: Console, folder: Path
) -> None:
    printed = console.export_text(clear=False)
    for row in (row for one in result["experiments"] for row in one["rows"]):
        assert spread(row["loss"], 3) in printed
        assert f"{row['state_bytes']:,}" in printed
    assert json.loads((folder / "one.json").read_text()) == json.loads(json.dumps(result))
    eightbit.draw(result, folder / "two.png")
    assert (folder / "one.png").read_bytes() == (folder / "two.png").read_bytes()


def test_the_addition_is_that_of_the_demo() -> None:
    task = Addition()
    (columns, sums), ((held_out, answers),) = task.training_batch(torch.Generator()), task.held_out
    assert len(columns) + len(held_out) == MODULUS**2
    assert torch.equal((columns.sum(1) - MODULUS) % MODULUS, sums)
    assert task.model(0)(held_out).shape == (len(answers), MODULUS)
    first, again, other = (torch.cat([p.flatten() for p in task.model(seed).parameters()]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_command_trains_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eightbit, "SHORT", TINY)
    target = tmp_path / "eightbit.json"
    arguments = ["--epochs", "1", "--steps", "2", "--seeds", "1", "--json", str(target)]
    outcome = CliRunner().invoke(app, ["demo", "eightbit", *arguments])
    assert outcome.exit_code == 0, outcome.output
    written = json.loads(target.read_text())
    assert written["command"] == "trysquare demo eightbit --epochs 1 --steps 2 --seeds 1"
    assert [one["steps"] for one in written["experiments"]] == [1, 2]
