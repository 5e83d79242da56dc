"""What THORN launches, written down without a GPU; `interpreted/thorn.py` runs it."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it has wheels for Linux only")

from trysquare import kernels
from trysquare.kernels import _described, _polar_choices, polar
from trysquare.kernels._polar_choices import Product
from trysquare.thorn import THORN

CPU = torch.device("cpu")
PRODUCTS: tuple[Product, ...] = ("gram", "square")


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


def test_new_betas_are_rehearsed_no_more_than_a_new_rate() -> None:
    """A scheduler may cycle both in every step."""
    parameter = torch.nn.Parameter(torch.ones(4, 6))
    with kernels.recording():
        optimizer = THORN([{"params": [parameter], "orthogonalize": True}], backend="triton", none_grad=False)
        parameter.grad = torch.ones(4, 6)
        optimizer.step()
        rehearsed = set(optimizer._rehearsed)
        optimizer.param_groups[0].update(lr=0.5, betas=(0.8, 0.9))
        optimizer.step()
    assert optimizer._rehearsed == rehearsed


@pytest.mark.parametrize("tile", [choice.tile for choice in _polar_choices.POINTERS])
def test_a_tile_by_pointers_is_that_which_was_chosen(tile: _polar_choices.Tile) -> None:
    x = torch.zeros(1, 512, 512, dtype=torch.bfloat16)
    with kernels.recording() as launches:
        polar.symmetric_product(x, x, tile)
        (launch,) = launches
    assert (launch.constants["SIDE"], launch.constants["INNER"]) == (tile.side, tile.inner)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("product", ["gram", "square"])
def test_half_precision_takes_the_symmetric_kernel_from_512_rows_on(product: Product, dtype: torch.dtype) -> None:
    assert _polar_choices.of_symmetric(product, 511, dtype, CPU) is None
    choice = _polar_choices.of_symmetric(product, 512, dtype, CPU)
    assert choice is not None
    assert choice.source == _polar_choices.BY_RULE


def test_hopper_describes_its_operands() -> None:
    """Which leaves XXᵀ of small matrices to cuBLAS."""
    with kernels.recording((9, 0)):
        assert _polar_choices.of_symmetric("gram", 767, torch.bfloat16, CPU) is None
        for rows, wide in ((768, 1), (2048, 2)):
            for product in PRODUCTS:
                choice = _polar_choices.of_symmetric(product, rows, torch.bfloat16, CPU)
                assert choice is not None
                assert (choice.tile.wide, choice.source) == (wide, _polar_choices.MEASURED)
                assert _polar_choices.by_pointers(choice.tile).wide == 0


def test_parts_of_a_batch_leave_no_place_idle() -> None:
    """72 programs a matrix in 132 places: eleven fill six rounds, and 84 as parts of 18 would take one more."""
    assert polar._at_once(84, 18, 72, 132) == 11
    assert polar._at_once(84, 10, 72, 132) == 9
    assert polar._at_once(5, 3, 132, 132) == 3
    assert polar.Products(64, torch.float64, CPU).at_once(84, 18) == 18
    assert polar.Products(2048, torch.bfloat16, CPU).at_once(18, 18) == 18


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("product", ["gram", "square"])
def test_other_products_are_cublas(product: Product, dtype: torch.dtype) -> None:
    assert _polar_choices.of_symmetric(product, 4096, dtype, CPU) is None


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (lambda x: x, True),
        (lambda x: x.mT, True),
        (lambda x: x[:, :, 1:], False),  # begins between two multiples of 16 bytes
        (lambda x: x[:, :, :8], True),
        (lambda x: x[:, :, ::2], False),
        (lambda x: x[:0], False),
        (lambda x: torch.zeros(2, 8, 9, dtype=x.dtype), False),  # rows of 18 bytes
    ],
)
def test_what_can_be_described(view: Callable[[torch.Tensor], torch.Tensor], expected: bool) -> None:
    if _described.TensorDescriptor is None:
        pytest.skip("Triton has had descriptors that serve since 3.5")
    x = view(torch.zeros(2, 16, 24, dtype=torch.bfloat16))
    found = _described.described(x, 16, 16)
    assert (found is not None) is expected
    if found is not None:
        laid_out = x if found.by_rows else x.mT
        descriptor = found.descriptor
        assert descriptor.base is x
        assert (tuple(descriptor.shape), tuple(descriptor.strides)) == (laid_out.shape, laid_out.stride())


def test_products_are_measured_on_a_gpu_only() -> None:
    with pytest.raises(ValueError, match="measured on an NVIDIA or AMD GPU"):
        _polar_choices.measure([(1, 512, 512)], torch.bfloat16, CPU)


def test_the_fastest_of_a_size_is_marked() -> None:
    rows = [_polar_choices.Measurement(512, 512, name, time, time) for name, time in (("cuBLAS", 2.0), ("tile", 1.0))]
    marked = _polar_choices.table_of(rows).splitlines()[1:]
    assert [line.endswith("*") for line in marked] == [False, True]
