"""THORN's kernels where operands are awkward, and where they fail; `test_interpreted` runs this."""

from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from trysquare.kernels import _launch, polar
from trysquare.kernels import thorn as launchers
from trysquare.kernels._polar_choices import Tile
from trysquare.ops import polar as ops
from trysquare.ops import polar_express
from trysquare.thorn import THORN

TILE = Tile(16, 16, 4, 1)
TILES = [TILE, TILE._replace(wide=1), TILE._replace(wide=2)]


def integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Small ones: no product of them is rounded in float32."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 24, 40), (2, 72, 32), (2, 33, 17), (1, 1, 5)])
@pytest.mark.parametrize("tile", TILES)
def test_products_are_exact_where_nothing_is_rounded(
    tile: Tile, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x = integers(shape, dtype)
    tall = x.mT.contiguous().mT
    gram = x.double() @ x.double().mT
    for own in (x, tall):
        assert torch.equal(polar.symmetric_product(own, own, tile), gram.to(dtype))
        base = gram.to(dtype)
        found = polar.symmetric_product(own, own, tile, base, 2.0, -0.5)
        assert torch.equal(found, (2 * base.double() - 0.5 * gram).to(dtype))
        scale = 2.0 ** torch.arange(-1.0, len(x) - 1, dtype=torch.float64)
        found = polar.symmetric_product(own, own, tile, base, 2.0, -0.5, scale)
        assert torch.equal(found, (scale.view(-1, 1, 1) * (2 * base.double() - 0.5 * gram)).to(dtype))


@pytest.mark.parametrize("tile", TILES)
def test_a_symmetric_product_is_symmetric_bit_for_bit(tile: Tile) -> None:
    a = torch.randn(2, 40, 40, generator=torch.Generator().manual_seed(0))
    left = a + a.mT
    product = polar.symmetric_product(left, left @ left, tile)
    assert torch.equal(product, product.mT)


@pytest.mark.parametrize("tall", [False, True])
def test_half_work_does_not_enlarge_what_is_rounded(tall: bool) -> None:
    """Products that are made symmetric enlarge it eightfold: see `ops.polar.gram_form`."""
    u = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    u = (u @ torch.randn(32, 128, generator=torch.Generator().manual_seed(1))).unsqueeze(0)
    x = (u / (1.02 * u.norm())).to(torch.bfloat16)
    x = x.mT.contiguous().mT if tall else x
    coefficients = polar_express.coefficients(5, 1e-3, 0.02, 0.02)
    exact = ops.standard_form(x.double(), coefficients)
    products = polar.Products(64, torch.bfloat16, torch.device("cpu"))
    standard = ops.standard_form(x, coefficients, products)
    gram = ops.gram_form(x, coefficients, products)
    assert (gram.double() - exact).norm() < 2 * (standard.double() - exact).norm()


@pytest.mark.parametrize("power", [-20, 60, 100])
def test_what_is_multiplied_does_not_depend_on_the_scale_of_the_gradient(power: int) -> None:
    gradient = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    shape = launchers.Shape(1, 5, 7)
    numbers = launchers.numbers_of(torch.device("cpu"), 0.1, (0.9, 0.9), 0.0, 1e-30)
    found = []
    for g in (gradient, gradient * 2.0**power):
        bucket = launchers.Matrices([gradient], [g], [torch.zeros(5, 7)], None, [torch.ones((), dtype=torch.float64)])
        found.append(launchers.prepare_(bucket, shape, numbers, None, torch.float32))
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("power", "is_plain"), [(0, True), (-30, True), (30, True), (-50, False), (50, False)])
def test_a_matrix_of_a_plain_norm_is_left_as_it_is(power: int, is_plain: bool, dtype: torch.dtype) -> None:
    """Of any other it is divided by its norm, in blocks that one program takes one after the other."""
    gradients = [torch.randn(130, 600, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    gradients[0] *= 2.0**power
    numbers = launchers.numbers_of(torch.device("cpu"), 0.1, (0.0, 0.9), 0.0, 1e-30, safety_factor=0.25)
    own = launchers.Shape(1, 130, 600)
    steps = [torch.ones((), dtype=torch.float64)] * 2

    def prepared(inverse: Tensor | None) -> Tensor:
        bucket = launchers.Matrices(gradients, gradients, [torch.zeros(130, 600) for _ in gradients], None, steps)
        return launchers.prepare_(bucket, own, numbers, None, dtype, inverse)

    inverse = torch.empty(2, dtype=torch.float64)
    found = prepared(inverse)
    expected = gradients[0].to(dtype) if is_plain else prepared(None)[0]
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], gradients[1].to(dtype))
    assert (inverse[0] == 1.0) is not is_plain
    norm = 1.25 * gradients[1].double().norm()
    assert torch.equal(inverse[1].float(), (1 / norm).float())


@pytest.mark.parametrize("orthogonalize", [True, False])
def test_kernels_that_cannot_be_compiled_change_nothing(
    orthogonalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 6))
    optimizer = THORN([{"params": [parameter], "orthogonalize": orthogonalize}], backend="triton", none_grad=True)
    parameter.grad = torch.ones(4, 6)
    compiled = _launch._compile

    def fails(kernel: Any, *rest: Any) -> None:
        if kernel.__name__ in {"_apply", "_step"}:
            raise RuntimeError("no room")
        compiled(kernel, *rest)

    monkeypatch.setattr(_launch, "_compile", fails)
    monkeypatch.setattr(InterpretedFunction, "warmup", lambda *_, **__: None, raising=False)  # Triton 3.2's has none
    with pytest.raises(RuntimeError, match="no room"):
        optimizer.step()
    assert torch.equal(parameter, torch.ones(4, 6))
    assert parameter.grad is not None
    assert optimizer.state[parameter]["step"] == 0
    monkeypatch.undo()
    optimizer.step()
    assert not torch.equal(parameter, torch.ones(4, 6))
    assert parameter.grad is None
