"""A step of DolphinFlow8bit takes one bounded workspace, whatever the size of a tensor, and can count beyond 2³¹.

The matrix mode needs a whole matrix at once; a parameter that is not contiguous needs its rows.
"""

import itertools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trysquare import DolphinFlow8bit, _batches
from trysquare._windows import Span, Window, spans, spread
from trysquare_conformance.behaviour import Shapes, all_parameters
from trysquare_conformance.lanes import LANES
from trysquare_conformance.memory import peak_bytes

FLOAT32 = 4
SMALL = 1 << 13
"""Bytes of what does not grow with anything: norms, corrections, boundaries of maps, a window's shape."""

SHAPES: dict[str, Shapes] = {
    "tall": [(2_500, 20)],
    "wide": [(20, 2_500)],
    "rows of blocks": [(50, 1024)],
    "one row": [(1, 50_000)],
    "one dimension": [(50_001,)],
    "convolution": [(64, 16, 3, 3)],
    "many alike": [(64, 64)] * 12,
    "mixed": [(250, 100), (150,), (100, 250), (150,), (1, 1, 9)],
}
RULES: dict[str, dict[str, Any]] = {
    "vector": {},
    "none": {"ortho_mode": None},
    "skip": {"nonfinite": "skip"},
    "plain": {"adaptive_lr": False, "gradient_clipping": None},
}
WORKSPACE = 1 << 17
MISSING = LANES["compiled-cpu"].available()


def peak(shapes: Shapes, dtype: torch.dtype = torch.float32, *, transposed: bool = False, **settings: Any) -> int:
    """What the second step of an optimizer takes at most."""
    weights = [torch.ones(shape, dtype=dtype) for shape in shapes]
    params = [torch.nn.Parameter(w.mT.contiguous().mT if transposed else w) for w in weights]
    optimizer = DolphinFlow8bit(params, workspace_bytes=WORKSPACE, **settings)
    for p in all_parameters(optimizer):
        p.grad = torch.ones_like(p)
    optimizer.step()
    return peak_bytes(optimizer.step)


def rows(shapes: Shapes) -> int:
    """What does grow: a coefficient for every row, and one for every block of a window."""
    return FLOAT32 * 4 * max(_batches.rows_and_columns(torch.Size(shape))[0] for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SHAPES)
def test_a_step_stays_within_its_workspace(name: str, rule: str, dtype: torch.dtype) -> None:
    shapes = SHAPES[name]
    found = peak(shapes, dtype, **RULES[rule])
    assert found <= WORKSPACE + rows(shapes) + SMALL


@pytest.mark.parametrize("name", ["tall", "convolution"])
def test_a_parameter_that_is_not_contiguous_is_copied_by_rows(name: str) -> None:
    shapes = SHAPES[name]
    a_few_rows = 8 * FLOAT32 * 2 * _batches.rows_and_columns(torch.Size(shapes[0]))[1]
    assert peak(shapes, transposed=True) <= WORKSPACE + a_few_rows + rows(shapes) + SMALL


@pytest.mark.skipif(MISSING is not None, reason=f"nothing can be compiled here: {MISSING}")
@pytest.mark.parametrize("name", ["rows of blocks", "wide", "one dimension"])
def test_a_compiled_step_stays_within_its_workspace(name: str) -> None:
    shapes = SHAPES[name]
    assert peak(shapes, backend="compiled") <= WORKSPACE + rows(shapes) + SMALL


def test_a_larger_workspace_is_used() -> None:
    """Else the bound would say nothing."""
    assert peak(SHAPES["wide"]) > WORKSPACE / 2


# Large tensors


def test_a_step_of_three_billion_elements_is_traced() -> None:
    """Shapes and indices alone, on fake tensors: an index of 32 bits anywhere would not fit."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        p = torch.nn.Parameter(torch.empty(3 << 20, 1024, dtype=torch.bfloat16))
        p.grad = torch.empty_like(p)
        optimizer = DolphinFlow8bit([p], workspace_bytes=1 << 36, gradient_clipping=None)
        optimizer.step()
        state = optimizer.state[p]
        assert state["absmax1"].shape == (3 << 22,)
        assert state["state1"].numel() > 2**31


def test_spans_cover_every_entry_once_beyond_32_bits() -> None:
    entries, most = (1 << 33) + 77, 1 << 30
    found = list(spans(entries, most, 256))
    assert found[0].start == 0
    assert found[-1].stop == entries
    assert all(a.stop == b.start for a, b in itertools.pairwise(found))
    assert all(span.start % 256 == 0 and span.stop - span.start <= most for span in found)


@pytest.mark.parametrize("entries", [1, 255, 256, 257, 511, 512, 513, 5000])
@pytest.mark.parametrize("most", [1, 300, 512, 100_000])
def test_windows_hold_every_entry_once(entries: int, most: int) -> None:
    source, target = torch.arange(float(entries)), torch.zeros(entries)
    for span in spans(entries, most, 256):
        window, copy = Window(source, span, 256, -1), Window(target, span, 256)
        assert window.values.shape == copy.values.shape
        assert window.values.shape[0] >= 2
        assert (window.values.view(-1)[span.stop - span.start :] == -1).all()
        copy.values.copy_(window.values)
        copy.store()
    assert torch.equal(source, target)


@pytest.mark.parametrize("shape", [(7, 90), (90, 7), (5, 3, 40), (3, 2, 9, 11)])
@pytest.mark.parametrize("most", [1, 512])
def test_windows_of_any_layout_run_in_the_order_of_rows(shape: tuple[int, ...], most: int) -> None:
    plain = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    strange, target = plain.mT.contiguous().mT, torch.zeros(shape).mT.contiguous().mT
    found = []
    for span in spans(plain.numel(), most, 256):
        values = Window(strange, span, 256).values
        found.append(values.reshape(-1)[: span.stop - span.start])
        copy = Window(target, span, 256)
        copy.values.copy_(values)
        copy.store()
    assert torch.equal(torch.cat(found), plain.view(-1))
    assert torch.equal(target, plain)


@pytest.mark.parametrize("width", [1, 3, 100])
def test_a_value_a_row_is_spread_over_its_entries(width: int) -> None:
    values = torch.arange(20.0)
    whole = values.repeat_interleave(width)
    for start in range(0, 20 * width, 7):
        for stop in (start + 1, min(20 * width, start + 150), 20 * width):
            assert torch.equal(spread(values, width, Span(start, stop)), whole[start:stop])
