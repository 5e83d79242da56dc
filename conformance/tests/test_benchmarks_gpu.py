"""The GPU's benchmarks run without one: all of their code at toy sizes, and nothing of that can pass for a result."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
DOLPHINFLOW = "dolphinflow", "DolphinFlow"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package, which lives beside the sources and is not installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    for module in ("gpu.command", "gpu.matrices", "gpu.peers", "gpu.shapes", "gpu.targets", "gpu.works"):
        importlib.import_module(f"benchmarks.{module}")
    importlib.import_module("benchmarks.tables")
    return importlib.import_module("benchmarks.gpu")


def dry_run(target: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """A run in a process of its own, where Triton's interpreter can be chosen."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "benchmarks", "gpu", "--dry-run", "--rounds", "2", "--imports", "1"]
    run = subprocess.run(
        [*command, "--json", str(target), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    result: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    return result


def rows(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(work["work"], row["name"]): row for work in result["works"] for row in work["rows"]}


def test_a_dry_run_goes_through_every_row_and_makes_no_table(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = dry_run(tmp_path / "gpu-toy.json")
    assert result["dry_run"]
    assert [work["work"] for work in result["works"]] == list(gpu.command.NAMES)
    found = rows(result)
    assert found[DOLPHINFLOW]["backend"] == "eager"
    assert found[DOLPHINFLOW]["margin"] < 1
    assert found["thorn-qwen3", "THORN"]["error"] < 0.2
    without = [row["missing"] for row in found.values() if "missing" in row]
    assert all(reason.startswith(("not installed: pip install", "not available", "torch ")) for reason in without)
    tables = importlib.import_module("benchmarks.tables")
    monkeypatch.setattr(tables.results, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match="dry run"):
        tables.body("gpu")


def test_a_result_is_added_to(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines are lent by the minute."""
    target = tmp_path / "toy.json"
    for work in (["losses"], ["products", "--add"]):
        arguments = ["--dry-run", "--rounds", "2", "--json", str(target), "--work", *work]
        monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", *arguments])
        gpu.command.main(arguments)
    result = json.loads(target.read_text(encoding="utf-8"))
    assert [work["work"] for work in result["works"]] == ["products", "losses"]
    assert result["command"].count("python -m benchmarks gpu") == 2
    chosen = gpu.command.parse(["--json", str(target), "--add", "--work", "losses", "--rounds", "3", "--dry-run"])
    with pytest.raises(SystemExit, match="another number of rounds"):
        gpu.command.begun(chosen)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_dry_run_in_the_interpreter_runs_the_kernels(tmp_path: Path) -> None:
    row = rows(dry_run(tmp_path / "toy.json", "--work", "dolphinflow", TRITON_INTERPRET="1"))[DOLPHINFLOW]
    assert row["backend"] == "triton"
    assert row["margin"] < 1


def test_a_result_becomes_both_tables(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = importlib.import_module("benchmarks.tables")
    both = [measured(2.0), measured(1.0, "AdamW")]
    work = {"work": "dolphinflow", "title": "steps", "error": "distance", "rows": both}
    result = {
        "dry_run": False,
        "command": "python -m benchmarks gpu",
        "machine": {"gpu": "G", "driver": "1", "torch": "2", "triton": None},
        "peers": {"torchao": "0.18.0", "dion": None},
        "rounds": 3,
        "works": [work],
        "bars": gpu.targets.verdicts([work]),
        "ceilings": {"copy_gb_per_s": 3000.0},
    }
    monkeypatch.setattr(tables.results, "FOLDER", tmp_path)
    tables.results.write(tmp_path / "gpu-g.json", result)
    assert "| DolphinFlow, share of copy bandwidth | 0.90 | ≥ 0.85 | met |" in tables.body("gpu")
    assert "torchao 0.18.0: `python -m benchmarks gpu`" in tables.body("gpu")
    assert "| AdamW | – | 1.00 |" in tables.body("gpu_rows")


@pytest.mark.usefixtures("gpu")
def test_a_verification_is_kept_in_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables, verified = (importlib.import_module(f"benchmarks.{name}") for name in ("tables", "verified"))
    lane = {"lane": "triton-cuda", "algorithm": "thorn"}
    results = [{**lane, "status": "right", "margin": 0.25}, {**lane, "status": "wrong", "margin": 3.0}]
    machine = {"gpu": "A GPU", "torch": "2", "triton": "3"}
    report = dict.fromkeys(verified.KEPT, "") | {"results": results, "machine": machine, "command": "trysquare"}
    monkeypatch.setattr(tables.results, "FOLDER", tmp_path)
    tables.results.write(tmp_path / "report", report)
    verified.main([str(tmp_path / "report"), "--commit", "abc"])
    assert (tmp_path / "verified-a-gpu.json").exists()
    assert "| triton-cuda | thorn | 2 | 1 | 3.00 |" in tables.body("verified")
    assert "commit abc. A GPU, torch 2, Triton 3: `trysquare`" in tables.body("verified")


def measured(milliseconds: float, name: str = "DolphinFlow") -> dict[str, Any]:
    over = {"AdamW(fused=True)": 2.0}
    return {"name": name, "ours": True, "median_ms": milliseconds, "of_bandwidth": 0.9, "over": over}


def test_what_was_not_measured_is_neither_met_nor_missed(gpu: ModuleType) -> None:
    unmeasured = gpu.targets.verdicts([])
    assert {row["met"] for row in unmeasured} == {None}
    assert {gpu.targets.in_words(row) for row in unmeasured} == {"not measured"}
    peer = {"name": gpu.steps.FUSED, "ours": False, "missing": "failed: out of memory"}
    work = {"work": "dolphinflow", "rows": [measured(2.0), peer]}
    ratio, share, *_ = gpu.targets.verdicts([work])
    assert "out of memory" in gpu.targets.in_words(ratio)
    assert share["met"]


def test_a_row_that_fails_is_a_row_and_ours_fail_the_run(gpu: ModuleType) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("no such kernel")

    entry = gpu.works.Entry("DolphinFlow", broken, lambda: gpu.works.Accuracy(0.0), ours=True)
    work = gpu.works.Work("dolphinflow", "steps", "", list, (entry,))
    clock = importlib.import_module("benchmarks.timing").Clock(torch.device("cpu"))
    result = {"works": [gpu.works.measure(work, clock, 2, 1.0)]}
    assert gpu.command.failures(result) == ["DolphinFlow failed: RuntimeError: no such kernel"]


def test_the_last_one_goes_where_memory_does_not_suffice(gpu: ModuleType) -> None:
    def greedy(_: Any) -> Any:
        steps = iter(range(5))  # as many as there are before the rounds: then nothing is left

        def step() -> None:
            if next(steps, None) is None:
                raise torch.OutOfMemoryError("out of memory")

        return gpu.works.Subject(step)

    modest = gpu.works.Entry("AdamW", lambda _: gpu.works.Subject(list), lambda: gpu.works.Accuracy(0.0))
    entry = gpu.works.Entry("dion", greedy, lambda: gpu.works.Accuracy(0.0))
    work = gpu.works.Work("dolphinflow", "steps", "", list, (modest, entry))
    clock = importlib.import_module("benchmarks.timing").Clock(torch.device("cpu"))
    first, second = gpu.works.measure(work, clock, 2, 1.0)["rows"]
    assert "median_ms" in first
    assert second["missing"] == "failed: no memory beside the others"


def test_the_models_have_the_matrices_that_they_have(gpu: ModuleType) -> None:
    full = gpu.shapes.FULL
    assert (len(full.gpt2), gpu.shapes.count(full.gpt2)) == (72, 84_934_656)
    assert (len(full.qwen3), gpu.shapes.count(full.qwen3)) == (196, 1_409_286_144)
    assert 1.0e9 < gpu.shapes.count(full.billion) < 1.05e9


def test_without_a_gpu_nothing_is_measured(gpu: ModuleType) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit, match="--dry-run"):
        gpu.command.main([])
