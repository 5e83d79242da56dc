"""What the measurements say of themselves is true: tables are made of results, a peak is a peak, a ratio is fair."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from trysquare_conformance.memory import peak_bytes

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package, which lives beside the sources and is not installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    for module in ("timing", "tables", "results", "gpt2", "thorn"):
        importlib.import_module(f"benchmarks.{module}")
    return importlib.import_module("benchmarks")


def test_every_table_of_readme_and_docs_is_what_the_results_say(benchmarks: ModuleType) -> None:
    benchmarks.tables.main(["--check"])
    marked = [page.name for page in benchmarks.tables.pages() if benchmarks.tables.MARK.search(page.read_text())]
    assert "README.md" in marked


def test_a_table_that_somebody_typed_is_found(
    benchmarks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks.results, "ROOT", tmp_path)
    page = tmp_path / "README.md"
    page.write_text("<!-- table: cpu -->\nvery fast\n<!-- /table -->\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"README\.md"):
        benchmarks.tables.main(["--check"])
    assert "very fast" in page.read_text(encoding="utf-8")
    benchmarks.tables.main([])
    assert "very fast" not in page.read_text(encoding="utf-8")
    benchmarks.tables.main(["--check"])


@pytest.mark.parametrize(
    "found", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda found: found.stem
)
def test_a_committed_result_names_its_command_and_its_machine(found: Path) -> None:
    result = json.loads(found.read_text(encoding="utf-8"))
    assert result["command"]
    assert result["machine"]["torch"]
    assert result["machine"]["cpu"]


def test_there_are_21_million_parameters(benchmarks: ModuleType) -> None:
    assert round(benchmarks.gpt2.PARAMETERS, -6) == 21_000_000
    assert len(set(benchmarks.gpt2.SMALL_SHAPES)) == len(set(benchmarks.gpt2.SHAPES))


def test_peak_memory_counts_what_is_held_at_once() -> None:
    mebibyte = torch.ones(2**18)

    def hold_two_of_three() -> None:
        first = mebibyte + 1
        second = first + 1
        del first
        second.add(1)

    assert peak_bytes(hold_two_of_three) // 2**20 == 2


def test_a_ratio_compares_within_rounds(benchmarks: ModuleType) -> None:
    times = benchmarks.timing.Times
    assert times((2.0, 20.0, 6.0)).over(times((1.0, 10.0, 2.0))) == 2


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason=f"torch {torch.__version__} has no torch.optim.Muon")
def test_muons_polar_factor_is_read_off_its_step(benchmarks: ModuleType) -> None:
    """Orthogonal up to what five quintics leave, wide or tall: its singular values lie around 1."""
    for shape in ((1, 20, 60), (1, 60, 20)):
        sigma = torch.linalg.svdvals(benchmarks.thorn.muons(torch.randn(shape)))
        assert 0.5 < sigma.min() < sigma.max() < 1.5


def test_thorn_and_its_rivals_step_the_same_parameters(benchmarks: ModuleType) -> None:
    assert sum(rows * columns for rows, columns in benchmarks.thorn.MATRICES) == 14_155_776
    assert sum(u.numel() for u in benchmarks.thorn.batches()) == 14_155_776
