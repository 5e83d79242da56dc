"""Kernels compiled ahead of time: what a launch becomes, and that a spill or a failure is told."""

import re
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import trysquare
from trysquare_conformance import ahead_of_time, cli, main_configurations
from trysquare_conformance.lanes import WITH_KERNELS
from trysquare_conformance.main_configurations import Configuration
from trysquare_conformance.report.sample import kernel
from trysquare_conformance.report.schema import Kernel
from trysquare_conformance.verdict import verdict

triton = pytest.importorskip("triton", reason="Triton is not installed: it has wheels for Linux only")

from triton.backends.compiler import GPUTarget  # noqa: E402


def of(step: Any) -> list[ahead_of_time.Request]:
    return ahead_of_time.requests([Configuration("dolphinflow", "a test", step)])[0]


def update(columns: int = 8192) -> ahead_of_time.Request:
    """The launch of the update of rows."""
    configuration = main_configurations._step
    found = of(lambda: configuration(trysquare.DolphinFlow, ((16, columns),), torch.float32))
    return next(request for request in found if request.kernel.__name__ == "_update_rows")


def test_a_launch_is_specialised_as_a_real_one() -> None:
    request = update(4800)
    signature, constants = dict(request.signature), dict(request.constants)
    names = request.kernel.arg_names
    assert signature["table"] == "*i64"
    assert (signature["rows"], signature["columns"], signature["count"]) == ("i32", "i32", "constexpr")
    assert constants["count"] == 1
    assert constants["finite"] is None
    assert {"rows", "columns", "table"} <= {names[place] for place in request.aligned}
    assert "columns" not in {names[place] for place in update(4801).aligned}


def test_equal_launches_are_one_compilation() -> None:
    def twice() -> None:
        main_configurations._step(trysquare.DolphinFlow, ((16, 64), (16, 64), (16, 60)), torch.float32)

    names = [request.kernel.__name__ for request in of(twice)]
    assert len(names) == len({(r.key) for r in of(twice)})
    assert names.count("_update_rows") == 2


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_kernel_that_fits_tells_what_it_takes(target: str) -> None:
    if target not in ahead_of_time.known_targets():
        pytest.skip("this Triton needs ROCm's linker")
    found = ahead_of_time.compile_for(update(64), target)
    assert (found["status"], found["error"]) == ("fits", None)
    assert (found["registers"] or 0) > 8
    assert (found["local"], found["stack"], found["spills"]) == (0, 0, 0)


def test_places_are_64_bit_numbers() -> None:
    """Members × rows × columns may exceed 2³¹."""
    target = GPUTarget("cuda", 90, 32)
    step, shapes = main_configurations._step, main_configurations.SHAPES
    for request in of(lambda: step(trysquare.DolphinFlow, shapes, torch.float32)):
        made = triton.compile(ahead_of_time._source(request, target), target=target, options=dict(request.options))
        places = re.findall(r"tt\.addptr .* : tensor<\S*!tt\.ptr<f32>>, tensor<\S*x(i\d+)>", made.asm["ttir"])
        assert set(places) <= {"i64"}, request.kernel.__name__


def in_loops(ptx: str) -> str:
    """What is run again and again: between a label and a branch back to it."""
    labels = {found[1]: found.start() for found in re.finditer(r"^(\$L\w+):", ptx, re.MULTILINE)}
    spans = [(labels[to[1]], to.start()) for to in re.finditer(r"\bbra(?:\.uni)?\s+(\$L\w+);", ptx)]
    return "\n".join(ptx[start:end] for start, end in spans if start < end)


@pytest.mark.parametrize(("dtype", "vectors"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_rows_of_an_odd_vocabulary_take_sixteen_bytes_at_a_time(dtype: torch.dtype, vectors: int) -> None:
    """A thread holds 16 logits of a tile; those at the ends of a row are outside the loop."""
    assert main_configurations.VOCABULARY % 2
    step = main_configurations._stablemax
    launches = ahead_of_time.requests([Configuration("stablemax", "a test", lambda: step(dtype, backend="triton"))])[0]
    target, found = GPUTarget("cuda", 90, 32), {}
    for request in launches:
        made = triton.compile(ahead_of_time._source(request, target), target=target, options=dict(request.options))
        found[request.kernel.__name__] = made.asm["ptx"]
    assert re.findall(r"ld\.global\S*", in_loops(found["_sums"])) == ["ld.global.v4.b32"] * vectors
    for access in ("ld", "st"):
        assert found["_gradient"].count(f"{access}.global.v4.b32") == vectors


def test_a_planted_spill_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trysquare.kernels.dolphinflow.warps", lambda _: 1)
    found = ahead_of_time.compile_for(update(), "sm_90")
    assert found["status"] == "spills"
    assert (found["local"] or 0) + (found["stack"] or 0) > 0


@triton.jit
def broken(table, ROWS: triton.language.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    triton.language.store(table + triton.language.arange(0, ROWS), 0)


def test_a_kernel_that_does_not_compile_is_told() -> None:
    signature, options = (("table", "*i64"), ("ROWS", "constexpr")), update(64).options
    request = ahead_of_time.Request("dolphinflow", "a test", broken, signature, (("ROWS", 3),), (), options)
    found = ahead_of_time.compile_for(request, "sm_90")
    assert found["status"] == "error"
    assert "power of 2" in str(found["error"])


def test_a_configuration_that_launches_nothing_is_an_error() -> None:
    configuration = Configuration("dolphinflow", "idle", lambda: None)
    assert ahead_of_time.requests([Configuration("muon", "without kernels", lambda: None)]) == ([], [])
    found, (error,) = ahead_of_time.requests([configuration])
    assert found == []
    assert (error["status"], error["error"]) == ("error", "the configuration launches no kernel")


def test_every_algorithm_with_kernels_has_main_configurations() -> None:
    assert set(WITH_KERNELS) <= {configuration.algorithm for configuration in main_configurations.configurations()}


def test_a_process_that_ends_early_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_of_time, "known_targets", lambda: ["sm_0"])
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # one process is enough
    with pytest.raises(RuntimeError, match="exit code 2 after 0 kernels"):
        ahead_of_time.run()


@pytest.mark.parametrize("kernels", [[kernel("sm_90", "spills")], [kernel("sm_90"), kernel("sm_90", "error")], []])
def test_only_kernels_that_fit_leave_the_verdict_right(kernels: list[Kernel]) -> None:
    row: Any = {"case": "a", "lane": "eager-cpu", "status": "right", "margin": 0.5, "error": None}
    lane: Any = {"name": "eager-cpu", "status": "ran", "reason": None}
    assert verdict([lane], [row], kernels=[kernel("sm_90")])[0] == "right"  # type: ignore[list-item]
    word, sentence = verdict([lane], [row], kernels=kernels)
    assert word == "could not tell"
    assert "kernel" in sentence


def test_the_command_exits_with_0_only_if_all_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for kernels, code in (([kernel("sm_90")], 0), ([kernel("sm_90", "spills")], 1), ([], 1)):
        monkeypatch.setattr(ahead_of_time, "run", lambda *_, found=kernels, **__: found)
        done = CliRunner().invoke(cli.app, ["kernels", "--json", str(tmp_path / "kernels.json")])
        assert done.exit_code == code
        assert '"kernels": [' in (tmp_path / "kernels.json").read_text(encoding="utf-8")
    done = CliRunner().invoke(cli.app, ["kernels", "--target", "sm_1"])
    assert done.exit_code == 2
    assert "the installed Triton compiles for sm_80" in " ".join(done.output.replace("│", " ").split())
