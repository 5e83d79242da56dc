"""Symmetric products on a GPU, by every tile: exact where nothing is rounded, and symmetric bit for bit."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: it has wheels for Linux only")

from trysquare.kernels import _polar_choices, polar
from trysquare.kernels._polar_choices import ONE, POINTERS, TWO, Tile
from trysquare.ops import polar as ops
from trysquare.ops import polar_express

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device")

TILES = [ONE, TWO, *(choice.tile for choice in POINTERS)]
SHAPES = [(1, 512, 64), (3, 520, 96), (2, 1096, 264), (1, 513, 31), (40, 640, 40), (2, 2048, 128), (1, 8, 8)]


def integers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Small ones: sums of their products are exact in float32, whatever the order."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_products_are_exact_where_nothing_is_rounded(
    tile: Tile, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x = integers(shape, dtype)
    gram = x.double() @ x.double().mT
    base = integers((shape[0], shape[1], shape[1]), dtype)
    base = base + base.mT
    scale = 2.0 ** torch.arange(-1.0, shape[0] - 1, dtype=torch.float64, device="cuda").remainder(5)
    for own in (x, x.mT.contiguous().mT):
        assert torch.equal(polar.symmetric_product(own, own, tile), gram.to(dtype))
        found = polar.symmetric_product(own, own, tile, base, 2.0, -0.5, scale)
        expected = scale.view(-1, 1, 1) * (2 * base.double() - 0.5 * gram)
        assert torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_symmetric_product_is_symmetric_bit_for_bit(tile: Tile) -> None:
    a = torch.randn(5, 648, 648, generator=torch.Generator("cuda").manual_seed(0), device="cuda").to(torch.bfloat16)
    left = a + a.mT
    product = polar.symmetric_product(left, left @ left, tile, left, 0.5, 2.0)
    assert torch.equal(product, product.mT)


@pytest.mark.parametrize("shape", [(2, 768, 1536), (2, 1536, 768), (1, 2048, 3072)], ids=str)
def test_half_work_does_not_enlarge_what_is_rounded(shape: tuple[int, int, int]) -> None:
    """Of matrices of half the rank: see `ops.polar.gram_form`."""
    batch, rows, columns = shape
    generator, rank = torch.Generator("cuda").manual_seed(0), min(rows, columns) // 2
    left, right = (
        torch.randn(batch, *size, generator=generator, device="cuda") for size in ((rows, rank), (rank, columns))
    )
    u = left @ right
    x = ops.widthwise((u / (1.02 * torch.linalg.matrix_norm(u)[:, None, None])).to(torch.bfloat16))
    coefficients = polar_express.coefficients(5, 1e-3, 0.02, 0.02)
    exact = ops.standard_form(x.double(), coefficients)
    products = polar.Products(min(rows, columns), torch.bfloat16, x.device)
    gram, standard = (form(x, coefficients, products).double() for form in (ops.gram_form, ops.standard_form))
    assert (gram - exact).norm() < 3 * (standard - exact).norm()


def test_programs_fill_the_multiprocessors() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    count = torch.cuda.get_device_properties(device).multi_processor_count
    assert _polar_choices.places(device, TWO) == count
    assert _polar_choices.places(device, POINTERS[0].tile) == 2 * count
