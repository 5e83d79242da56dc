"""What THORN launches, written down without a GPU; `interpreted/thorn.py` runs it."""

from collections import Counter

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it has wheels for Linux only")

from trysquare import kernels
from trysquare.kernels import _polar_choices
from trysquare.thorn import THORN

CPU = torch.device("cpu")


def launched(count: int, *, orthogonalize: bool) -> Counter[str]:
    """The names of what a step launches for so many parameters of one shape."""
    parameters = [torch.nn.Parameter(torch.ones(4, 6)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.ones(4, 6)
    with kernels.recording() as launches:
        group = {"params": parameters, "orthogonalize": orthogonalize}
        THORN([group], backend="triton", matmul_dtype=torch.float32).step()
        return Counter(launch.kernel.__name__ for launch in launches)


@pytest.mark.parametrize("orthogonalize", [True, False])
def test_parameters_of_one_shape_go_together(orthogonalize: bool) -> None:
    assert launched(1, orthogonalize=orthogonalize) == launched(7, orthogonalize=orthogonalize)


def test_a_step_of_matrices_is_so_many_launches() -> None:
    assert set(launched(2, orthogonalize=True)) == {
        *("_advance", "_accumulate", "_norms", "_normalize", "_row_squares", "_rates", "_apply")
    }
    assert set(launched(2, orthogonalize=False)) == {"_advance", "_weigh", "_step"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_the_symmetric_kernel_from_512_rows_on(dtype: torch.dtype) -> None:
    assert _polar_choices.of_symmetric(511, dtype, CPU) is None
    choice = _polar_choices.of_symmetric(512, dtype, CPU)
    assert choice is not None
    assert choice.source == _polar_choices.BY_RULE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_products_are_cublas(dtype: torch.dtype) -> None:
    assert _polar_choices.of_symmetric(4096, dtype, CPU) is None
    assert _polar_choices.of_wide(4096, torch.bfloat16) is None


def test_products_are_measured_on_a_gpu_only() -> None:
    with pytest.raises(ValueError, match="measured on an NVIDIA or AMD GPU"):
        _polar_choices.measure([(1, 512, 512)], torch.bfloat16, CPU)


def test_the_fastest_of_a_size_is_marked() -> None:
    rows = [_polar_choices.Measurement(512, 512, name, time, time) for name, time in (("cuBLAS", 2.0), ("tile", 1.0))]
    marked = _polar_choices.table_of(rows).splitlines()[1:]
    assert [line.endswith("*") for line in marked] == [False, True]
