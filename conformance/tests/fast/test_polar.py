"""The polar factor: against the singular value decomposition, form against form, and whatever its input's size is."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from trysquare.ops import _symmetric, polar, polar_express
from trysquare_conformance.behaviour import bits, normal
from trysquare_conformance.budget import STORED, Budget, Wrap, assert_same, judge, measure
from trysquare_conformance.lanes import LANES
from trysquare_conformance.noise import BFLOAT16, FLOAT32, FLOAT64, mixed
from trysquare_conformance.snapshots import to_array
from trysquare_reference import polar as reference
from trysquare_reference import polar_express as solved

SAFETY, EPS = 0.02, 1e-8
AMPLIFIED = 10_000
"""Roundings, where an error of the input grows with the product of the first coefficients: 1,000 after five."""

SHAPES = [(1, 12, 30), (3, 30, 12), (2, 9, 9), (2, 1, 7), (1, 7, 1)]
FORMS = ["standard", "gram"]
ITERS = [1, 2, 3, 5, 8, 13]
ARITHMETIC = {torch.float32: FLOAT32, torch.float64: FLOAT64}
both_forms = pytest.mark.parametrize("form", FORMS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
LOST = 2e10
FLAT = 1e-3
"""9b² − 20ac = 0 for the quintic of a point."""


def coefficients(iters: int = 5) -> tuple[polar.Coefficients, ...]:
    return polar_express.coefficients(iters, 1e-3, SAFETY, 0.02)


def factor(u: Tensor, iters: int = 5, *, eps: float = EPS, **choices: Any) -> Tensor:
    return polar.polar_factor(u, coefficients(iters), SAFETY, eps, **{"matmul_dtype": u.dtype, **choices})


def allowed(u: Tensor, form: str = "standard", iters: int = 5, arithmetic: Any = None) -> Budget:
    """What the reference page allows itself on this input in this form."""

    def run(wrap: Wrap) -> dict[str, Any]:
        starts = polar.restarts(iters)
        return {"x": reference.polar_factor(wrap(to_array(u)), coefficients(iters), SAFETY, EPS, form, starts)}

    dtype = arithmetic or ARITHMETIC[u.dtype]
    return measure(run, dtype, {"x": STORED[str(u.dtype).removeprefix("torch.")]}, seed=0)["x"]


def by_svd(u: Tensor, iters: int) -> Tensor:
    """U p(Σ) Vᵀ with the polynomial p of all iterations, in float64."""
    left, sigma, right = torch.linalg.svd(u.double(), full_matrices=False)
    sigma = sigma / ((1 + SAFETY) * u.double().square().sum((-2, -1), keepdim=True).sqrt()[..., 0])
    for a, b, c in coefficients(iters):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return left @ torch.diag_embed(sigma) @ right


def singular_values(x: Tensor) -> Tensor:
    return torch.linalg.svdvals(x.double())


@shapes
@both_forms
@pytest.mark.parametrize("iters", ITERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_the_polynomial_of_the_singular_values(
    shape: tuple[int, ...], form: str, iters: int, dtype: torch.dtype
) -> None:
    u = normal(shape, 0, dtype=dtype)
    found = factor(u, iters, form=form)
    assert found.dtype is dtype
    assert found.shape == u.shape
    assert judge(allowed(u, form, iters), to_array(found)).right
    if dtype is torch.float64:
        assert_same(found, by_svd(u, iters), scale=1.0, operations=AMPLIFIED)


@pytest.fixture(params=[3, 4, 8])
def panels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Symmetric products by panels of this width, of matrices that would be too small for it."""
    monkeypatch.setattr(_symmetric, "WIDTH", request.param)
    monkeypatch.setattr(_symmetric, "SMALLEST", 2)


@pytest.mark.usefixtures("panels")
@shapes
@both_forms
@pytest.mark.parametrize("iters", [1, 5, 13])
def test_symmetric_products_by_panels_stay_in_the_same_budget(shape: tuple[int, ...], form: str, iters: int) -> None:
    u = normal(shape, 12)
    assert judge(allowed(u, form, iters), to_array(factor(u, iters, form=form))).right


@pytest.fixture(params=[1, 2])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as on a CPU with AMX, of matrices that would be too small for it, with so many threads."""
    monkeypatch.setattr(_symmetric, "by_tiles", lambda _: True)
    monkeypatch.setattr(_symmetric, "GRAM_WIDTH", 4)
    monkeypatch.setattr(_symmetric, "HALVED", range(9, 13))
    monkeypatch.setattr(_symmetric, "SMALLEST", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


@pytest.mark.usefixtures("tiles")
@shapes
@both_forms
@pytest.mark.parametrize("iters", [1, 5, 13])
def test_whole_products_and_halves_of_them_stay_in_the_same_budget(
    shape: tuple[int, ...], form: str, iters: int
) -> None:
    u = normal(shape, 12)
    assert judge(allowed(u, form, iters), to_array(factor(u, iters, form=form))).right


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_a_multiple_of_the_identity_is_rounded_once(dtype: torch.dtype, traced: bool) -> None:
    """Torch on a CPU rounds a number to bfloat16 before it adds it to something in bfloat16."""
    z = normal((2, 5, 5), 0).to(dtype)
    number = 2.3200073128898127
    exact = (z.double() + number * torch.eye(5, dtype=torch.float64)).to(dtype)
    add = torch.compile(_symmetric.plus_identity_, backend="eager", fullgraph=True) if traced else None
    found = (add or _symmetric.plus_identity_)(z, number)
    assert bits(found) == bits(exact)
    assert traced or found is z


def test_panels_are_for_large_matrices_on_a_cpu() -> None:
    assert _symmetric.pays(torch.empty(1, _symmetric.SMALLEST, 2000))
    assert not _symmetric.pays(torch.empty(1, _symmetric.SMALLEST - 1, 2000))
    assert not _symmetric.pays(torch.empty(1, _symmetric.SMALLEST, 2000, device="meta"))


@both_forms
def test_eight_iterations_give_the_polar_factor(form: str) -> None:
    """The polynomial is within 2.4e-14 of 1 from 1e-3 on: what is left is rounding."""
    u = normal((2, 20, 31), 1, dtype=torch.float64)
    left, _, right = torch.linalg.svd(u, full_matrices=False)
    assert_same(factor(u, 8, form=form), left @ right, scale=1.0, operations=AMPLIFIED)


@pytest.mark.parametrize("shape", [(1, 160, 260), (1, 128, 128), (2, 40, 96)], ids=str)
@both_forms
def test_products_in_bfloat16_stay_in_their_budget(shape: tuple[int, ...], form: str) -> None:
    u = normal(shape, 2)
    found = factor(u, form=form, matmul_dtype=torch.bfloat16)
    assert found.dtype is torch.float32
    assert judge(allowed(u, form, arithmetic=mixed(BFLOAT16, BFLOAT16)), to_array(found)).right


@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (256, 640)], ids=str)
def test_the_chosen_products_and_form_are_no_further_from_the_polar_factor_than_muon(shape: tuple[int, int]) -> None:
    """torch.optim.Muon: five iterations in bfloat16 with its own coefficients."""
    u = normal((1, *shape), 3)
    left, _, right = torch.linalg.svd(u, full_matrices=False)
    x = (u / u.square().sum().sqrt()).bfloat16()
    x = x.mT if shape[0] > shape[1] else x
    for _ in range(5):
        x = polar.quintic(x, polar.MUON_COEFFICIENTS)
    muon = (x.mT if shape[0] > shape[1] else x).float()
    ours = factor(u, matmul_dtype=None)
    assert torch.linalg.norm(ours - left @ right) <= torch.linalg.norm(muon - left @ right)


@shapes
@both_forms
def test_a_batch_is_its_slices(shape: tuple[int, ...], form: str) -> None:
    u = normal((4, *shape[1:]), 4) * torch.tensor([1.0, 1e-3, 1e4, 0.0]).view(-1, 1, 1)
    whole = factor(u, form=form)
    for one, given in zip(whole, u, strict=True):
        assert judge(allowed(given[None], form), to_array(one[None])).right


@shapes
@both_forms
def test_the_transpose_has_the_transposed_factor(shape: tuple[int, ...], form: str) -> None:
    u = normal(shape, 5)
    assert judge(allowed(u, form), to_array(factor(u.mT, form=form).mT)).right


@both_forms
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-20, 1e-5, 1e20, 1e37, 1e38])
def test_the_size_of_the_input_does_not_matter(form: str, scale: float) -> None:
    """Subnormal numbers are coarse: that input is scaled up again for the comparison."""
    u = normal((2, 6, 11), 6).clamp(-3, 3) * scale
    back = (u.double() / scale).float()
    assert judge(allowed(back, form), to_array(factor(u, eps=1e-45, form=form))).right


@both_forms
def test_below_eps_the_factor_fades_with_its_input(form: str) -> None:
    u = normal((1, 4, 6), 7)
    faded = [singular_values(factor(u * scale, form=form)).max() for scale in (1e-9, 1e-10, 1e-12)]
    assert faded[0] > faded[1] > faded[2] > 0


@both_forms
@pytest.mark.parametrize("eps", [1e-8, 1e-45, 1e-300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_has_factor_zero(form: str, eps: float, dtype: torch.dtype) -> None:
    assert not factor(torch.zeros(2, 3, 4), eps=eps, form=form, matmul_dtype=dtype).any()


@both_forms
@pytest.mark.parametrize("iters", [5, 8, 12, 20])
def test_the_null_space_stays_small(form: str, iters: int) -> None:
    """Of rank 4: four singular values near 1, and what rounding has left of the others, as much as the reference."""
    u = normal((1, 12, 4), 8) @ normal((1, 4, 30), 9)
    found = factor(u, iters, form=form)
    assert judge(allowed(u, form, iters), to_array(found)).right
    sigma = singular_values(found)[0]
    assert sigma[:4].min() > 0.5 > sigma[4:].max()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@both_forms
def test_one_entry_that_is_not_finite_makes_its_matrix_so_and_no_other(form: str, value: float) -> None:
    u = normal((2, 4, 6), 10)
    u[0, 1, 2] = value
    found = factor(u, form=form)
    assert found[0].isnan().all()
    assert judge(allowed(u[1:], form), to_array(found[1:])).right


@both_forms
def test_the_input_is_only_read(form: str) -> None:
    for u in (normal((2, 4, 6), 11), normal((2, 6, 4), 11).mT, normal((1, 4, 6), 11).expand(3, 4, 6)):
        before = bits(u)
        factor(u, form=form)
        assert bits(u) == before


def test_empty_batches_are_allowed() -> None:
    assert factor(torch.zeros(0, 3, 4)).shape == (0, 3, 4)


# What is chosen


def test_restarts_are_one_for_five_iterations_and_then_every_four() -> None:
    expected = {1: (), 2: (), 3: (2,), 5: (2,), 6: (2, 4), 8: (2, 4), 9: (2, 4, 8), 12: (2, 4, 8), 13: (2, 4, 8, 12)}
    assert {iters: polar.restarts(iters) for iters in expected} == expected


@pytest.mark.parametrize("iters", [6, 7, 8, 10, 12, 16])
@pytest.mark.parametrize("rank", [8, 128])
def test_nothing_grows_out_of_the_rounding_of_a_matrix_without_full_rank(rank: int, iters: int) -> None:
    """A Gram matrix of rounded entries has negative eigenvalues, which diverge unless X is gone back to in time.

    The polynomials take no singular value beyond 1 + safety, and what is twice as large has not been rounded.
    """
    u = normal((256, rank), 0) @ normal((rank, 512), 1)
    found = factor(u.unsqueeze(0), iters, matmul_dtype=torch.bfloat16, form="gram")
    assert singular_values(found).max().item() <= 2 * (1 + SAFETY)


@pytest.mark.parametrize("shape", [(256, 512), (512, 256), (520, 640), (640, 520)])
@pytest.mark.parametrize("iters", [5, 8])
def test_without_full_rank_either_form_is_about_as_right(shape: tuple[int, int], iters: int) -> None:
    """Multipliers of the Gram form commute but for their rounding, which in the wrong order is enlarged eightfold."""
    rows, columns = shape
    rank = min(shape) // 2
    u = (normal((rows, rank), 0) @ normal((rank, columns), 1)).unsqueeze(0)
    exact = factor(u.double(), iters)
    standard, gram = (factor(u, iters, matmul_dtype=torch.bfloat16, form=form).double() for form in FORMS)
    assert (gram - exact).norm() < 2 * (standard - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_elongated_matrices_take_the_gram_form(dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    for rows, columns in ((3072, 768), (768, 3072), (2304, 768), (768, 1200)):
        assert polar.choose_form(rows, columns, cpu, dtype, 5) == "gram"
    for rows, columns in ((768, 768), (768, 1100), (1, 1)):
        assert polar.choose_form(rows, columns, cpu, dtype, 5) == "standard"
    assert polar.choose_form(3072, 768, cpu, dtype, 1) == "standard"


def test_small_matrices_keep_the_more_accurate_form_in_half_precision() -> None:
    cpu = torch.device("cpu")
    assert polar.choose_form(40, 960, cpu, torch.bfloat16, 5) == "standard"
    assert polar.choose_form(40, 960, cpu, torch.float32, 5) == "gram"


def test_products_are_never_narrower_than_the_device_multiplies_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert polar.choose_matmul_dtype(torch.float64, cpu) is torch.float64
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(polar, "NATIVE_BFLOAT16", native)
        assert polar.choose_matmul_dtype(torch.float32, cpu) is expected
    assert polar.choose_matmul_dtype(torch.float32, torch.device("mps")) is torch.float32


# Under torch.compile


@pytest.mark.skipif(LANES["compiled-cpu"].available() is not None, reason="nothing can be compiled here")
@both_forms
def test_it_is_one_graph_for_all_sizes(form: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    iters = 3  # each is in the graph once more; before the last the Gram form starts again
    table = coefficients(iters)

    def call(u: Tensor) -> Tensor:
        return polar.polar_factor(u, table, SAFETY, EPS, u.dtype, form)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for rows in (8, 9, 11):
        u = normal((2, rows, 30), rows)
        assert judge(allowed(u, form, iters), to_array(compiled(u))).right
    assert counter.frame_count <= 2, "the first size, then all sizes"


# Coefficients


def test_the_default_table_is_what_is_solved_for_the_defaults() -> None:
    found = np.array(polar_express.coefficients(5, 1e-3, 0.02, 0.02))
    table = np.array(polar_express.DEFAULT_COEFFICIENTS)
    assert np.array_equal(found.round(12), table.round(12))


@pytest.mark.parametrize("iters", [1, 2, 5, 8, 12])
def test_the_solver_is_the_references(iters: int) -> None:
    """Which solves the linear system: where an interval is nearly a point it has six of sixteen digits left."""
    bounds, safeties, cushions = (1e-7, 1e-3, 0.1, 0.9, 1.0), (0.0, 0.02, 0.1), (0.0, 0.02, 0.024, 0.5, 0.9)
    for lower, safety, cushion in itertools.product(bounds, safeties, cushions):
        ours, theirs = (one.coefficients(iters, lower, safety, cushion) for one in (polar_express, solved))
        for triple, expected in zip(ours, theirs, strict=True):
            flat = abs(expected[1] ** 2 / (expected[0] * expected[2]) - 20 / 9) < FLAT
            assert_same(triple, expected, operations=LOST if flat else 1000)


def test_no_setting_makes_the_solver_fail() -> None:
    settings = itertools.product(
        (1, 8, 30), (1e-300, 1e-12, 0.5, 1 - 1e-5, 1.0), (0.0, 0.5, 10.0), (0.0, 0.5, 0.999999)
    )
    for iters, lower, safety, cushion in settings:
        table = np.array(polar_express.coefficients(iters, lower, safety, cushion))
        assert table.shape == (iters, 3)
        assert np.isfinite(table).all()


@pytest.mark.parametrize("lower", [1e-6, 1e-3, 0.5, 0.99, 0.9999, 1 - 1e-5])
def test_the_quintics_error_is_level(lower: float) -> None:
    """It is reached with alternating sign at both ends and at both extrema between: no quintic is nearer to 1."""
    triple = polar_express.quintic(lower, 1.0)
    points = (lower, *polar_express.extrema(triple), 1.0)
    level = polar_express.levelled_error(points)
    signs = (1, -1, 1, -1)
    reached = [polar_express.value(triple, x) for x in points]
    assert_same(reached, [1 - sign * level for sign in signs], scale=max(map(abs, triple)))


@pytest.mark.parametrize("rows", [6, 512])
@pytest.mark.parametrize("iters", [1, 2, 3, 5, 8])
def test_the_gram_form_takes_up_a_norm_that_was_not_divided_by(iters: int, rows: int) -> None:
    """By powers of two, which change no digit; of matrices that are multiplied by panels otherwise, too."""
    x = torch.randn(3, rows, rows + 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x /= torch.linalg.matrix_norm(x)[:, None, None]
    coefficients = [polar.MUON_COEFFICIENTS] * iters
    norm = 2.0 ** torch.tensor([-9.0, 0.0, 5.0], dtype=torch.float64)
    found = polar.gram_form(x * norm[:, None, None], coefficients, inverse=1 / norm)
    assert torch.equal(found, polar.gram_form(x, coefficients, inverse=torch.ones_like(norm)))
    assert rows == 512 or torch.equal(found, polar.gram_form(x, coefficients))
