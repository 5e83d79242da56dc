"""What a compiled kernel is found again by: Triton must have compiled it for all arguments that look alike."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed: it has wheels for Linux only")

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime import jit

from trysquare.kernels import _described, _launch, clipping

FORMATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int64)

pytestmark = pytest.mark.skipif(not _launch.DIRECT, reason="this Triton is asked anew for every launch")


def specialized(argument: Any) -> Any:
    """What Triton compiles for where an NVIDIA GPU's kernel gets such an argument."""
    kernel: Any = clipping._sums_of_squares
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    _, specialization, _ = bind(argument, argument, argument, argument, DTYPE=None, PART=1, BLOCK=1, ALIGNED=True)
    return specialization[0]


def tensors() -> st.SearchStrategy[torch.Tensor]:
    """Of every format, beginning anywhere."""
    whole = st.sampled_from([torch.zeros(64, dtype=dtype) for dtype in FORMATS])
    return st.builds(lambda tensor, start: tensor[start:], whole, st.integers(0, 20))


def descriptors() -> st.SearchStrategy[Any]:
    """Of batches of several formats and shapes, in several blocks."""

    def described(dtype: torch.dtype, batch: int, rows: int, inner: int) -> Any:
        found = _described.described(torch.zeros(batch, 64, 128, dtype=dtype), rows, inner)
        assert found is not None
        return found.descriptor

    sides = st.sampled_from([16, 32, 64])
    return st.builds(described, st.sampled_from([torch.bfloat16, torch.float16]), st.integers(1, 3), sides, sides)


@given(st.lists(st.integers(0, 2**62) | st.integers(0, 64) | tensors() | descriptors() | st.none(), max_size=20))
def test_arguments_of_one_kind_are_compiled_for_alike(arguments: list[Any]) -> None:
    found: dict[Any, Any] = {}
    for argument in arguments:
        own = specialized(argument)
        assert found.setdefault(_launch._kind(argument), own) == own


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2),
        (16, 17),
        (2**31 - 16, 2**31),
        (torch.zeros(8), torch.zeros(8)[1:]),
        (torch.zeros(8), torch.zeros(8).double()),
        (torch.zeros(8), None),
    ],
)
def test_what_triton_tells_apart_is_told_apart(one: Any, other: Any) -> None:
    assert specialized(one) != specialized(other)
    assert _launch._kind(one) != _launch._kind(other)
