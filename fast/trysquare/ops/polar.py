"""Towards the polar factor by matrix products alone: Newton–Schulz steps, in standard and in Gram form.

Shapes are (B, R, C), a batch of B matrices. The quintic of one step is aX + (bA + cA²)X with A = XXᵀ. It is evaluated
on the wide side up: XXᵀX = X(XᵀX), so a matrix with more rows than columns is transposed and the smaller Gram matrix
formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from trysquare.ops import _scratch, _symmetric, clipping
from trysquare.ops._row_blocks import row_blocks
from trysquare.ops._scalar import Scalar

Coefficients = tuple[float, float, float]
MUON_COEFFICIENTS: Coefficients = (3.4445, -4.7750, 2.0315)

PLAIN = 1e-6, 1e15
"""Norms of a float32 matrix whose entries can be squared as they are: what is lost is below their rounding."""

SMALL = 256
NATIVE_BFLOAT16 = any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))
"""Whether this CPU multiplies bfloat16 in hardware: without it a bfloat16 product is slower than one in float32."""


class Products:
    """The products of the iterations as torch forms them; Triton kernels have their own, with the same meaning."""

    def gram(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """XXᵀ, times a number of each matrix, (B,) (None: 1)."""
        return _scaled(x @ x.mT, scale)

    def add_multiple(
        self,
        base: Tensor,
        left: Tensor,
        right: Tensor,
        beta: float,
        alpha: float = 1.0,
        scale: Tensor | None = None,
        *,
        symmetric: bool = True,  # noqa: ARG002  # for those who make use of it
    ) -> Tensor:
        """β·base + α·left · right, times a number of each matrix, (B,) (None: 1); a new tensor.

        Of symmetric matrices that commute, so that the product is ``symmetric``; or not quite.
        """
        return _scaled(torch.baddbmm(base, left, right, beta=beta, alpha=alpha), scale)


def _scaled(products: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return products
    wide = scale.to(torch.promote_types(products.dtype, torch.float32))  # in half precision it would be rounded
    return (products * wide.view(-1, 1, 1)).to(products.dtype)


BY_TORCH = Products()


def newton_schulz(
    u: Tensor,
    steps: int,
    eps: Scalar,
    coefficients: Coefficients = MUON_COEFFICIENTS,
    products: Products = BY_TORCH,
) -> Tensor:
    """n·X after ``steps`` of X ← aX + bAX + cA²X with A = XXᵀ, from X = u/n with n = ‖u‖_F; u itself where n < ε."""
    tall = u.shape[-2] > u.shape[-1]
    norm = u.square().sum(dim=(-2, -1), keepdim=True).sqrt()
    x = (u / norm).mT if tall else u / norm
    x = standard_form(x, [coefficients] * steps, products)
    return torch.where(norm < eps, u, (x.mT if tall else x) * norm)


def polar_factor(
    u: Tensor,
    coefficients: Sequence[Coefficients],
    safety_factor: Scalar,
    eps: Scalar,
    matmul_dtype: torch.dtype | None = None,
    form: str | None = None,
) -> Tensor:
    """UVᵀ of u = UΣVᵀ, approximately: one quintic after the other on X = u/((1 + safety)·max(‖u‖_F, ε)).

    ``u`` is float32 or float64, and so is the result. The products run in ``matmul_dtype`` (None: what suits the
    device), the polynomial is evaluated in ``form`` (None: what takes fewer operations at this shape); the norm is
    taken, and divided by, before anything is rounded. Zero stays zero.
    """
    rows, columns = u.shape[-2:]
    dtype = choose_matmul_dtype(u.dtype, u.device) if matmul_dtype is None else matmul_dtype
    form = choose_form(rows, columns, u.device, dtype, len(coefficients)) if form is None else form
    x = normalized(u, safety_factor, eps, dtype)
    x = evaluator(form)(widthwise(x), coefficients)
    found = _scratch.empty(_scratch.UPDATE, u.shape, u.dtype, u.device)
    return found.copy_(x.mT if rows > columns else x)


def evaluator(form: str) -> Callable[..., Tensor]:
    """What iterates in a form: of an X that is normalised and no taller than wide, coefficients, and products."""
    return gram_form if form == "gram" else standard_form


def widthwise(x: Tensor) -> Tensor:
    """X, transposed where it is taller than wide."""
    return x.mT if x.shape[-2] > x.shape[-1] else x


def scratch(form: str, rows: int, columns: int) -> int:
    """Elements that are held at the same time while a matrix is iterated on: X, its next, and square ones."""
    n, m = min(rows, columns), max(rows, columns)
    squares = 4 if form == "gram" else 2
    return n * max(m + squares * n, 2 * m + n)


def choose_matmul_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What products on a state of ``dtype`` run in: bfloat16 where the device multiplies it faster than float32.

    That is a CPU with bfloat16 instructions (2.4 times as fast on a fourth-generation EPYC; float16 it would emulate)
    and a CUDA device of capability 8.0 or more.
    """
    if dtype != torch.float32:
        return dtype
    if device.type == "cpu":
        return torch.bfloat16 if NATIVE_BFLOAT16 else dtype
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)):
        return torch.bfloat16
    return dtype


def choose_form(rows: int, columns: int, device: torch.device, dtype: torch.dtype, iters: int) -> str:  # noqa: ARG001  # no device differs yet
    """The form that takes fewer operations: for five iterations "gram" above an aspect ratio of 1.5.

    In half precision small matrices stay in the standard form: with few terms to average over, the rounding of R and Q
    shows (relative error in bfloat16 0.031 at 40 × 96, 0.016 at 400 × 960, against 0.017 and 0.010).
    """
    n, m = min(rows, columns), max(rows, columns)
    if n < SMALL and dtype in {torch.bfloat16, torch.float16}:
        return "standard"
    segments = len(restarts(iters)) + 1
    # an iteration multiplies for Z, Q and twice for the next R; a segment's first needs none for Q, its last no next R
    square_products = 4 * iters - 3 * segments
    standard = iters * (4 * n * n * m + 2 * n * n * n)
    gram = segments * 4 * n * n * m + square_products * 2 * n * n * n
    return "gram" if gram < standard else "standard"


def restarts(iters: int) -> tuple[int, ...]:
    """The iterations before which the Gram form goes back to X, as its R has drifted from XXᵀ by then.

    One restart is enough for five iterations. In bfloat16, on matrices without full rank, singular values reached 128
    times what they should be after six and 5e14 times after seven, and with a second restart after twelve as well; from
    the third iteration on, no more than four may follow each other.
    """
    if iters < 6:
        return (2,) if iters > 2 else ()
    return (2, *range(4, iters, 4))


def normalized(u: Tensor, safety_factor: Scalar, eps: Scalar, dtype: torch.dtype) -> Tensor:
    """u/((1 + safety)·max(‖u‖_F, ε)), rounded to ``dtype`` at the end."""
    if _may_look(u.device):
        norm = _norm(u, None)
        if bool(((norm > PLAIN[0]) & (norm < PLAIN[1])).all()):
            return _divided(u, dtype, (1 + safety_factor) * norm.clamp(min=eps))
    largest = torch.maximum(u.amax((-2, -1), keepdim=True), -u.amin((-2, -1), keepdim=True))
    largest = torch.where(largest == 0, 1.0, largest)
    norm = _norm(u, largest).clamp(min=1.0)  # which it is but for zero
    is_small = norm * largest < eps
    first = torch.where(is_small, eps, largest)  # eps over a subnormal is infinite
    return _divided(u, dtype, first, (1 + safety_factor) * torch.where(is_small, 1.0, norm))


def _may_look(device: torch.device) -> bool:
    """Whether to look at a number is to wait for nothing."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def _norm(u: Tensor, largest: Tensor | None) -> Tensor:
    """‖u‖_F, of u over its largest entry if that is given: then no square leaves the range."""
    lengths = u.new_empty(*u.shape[:-1], 1)
    for block in row_blocks(u):
        part = u[block] if largest is None else u[block] / largest[block[0]]
        lengths[block] = torch.linalg.vector_norm(part, dim=-1, keepdim=True)
    norm: Tensor = torch.linalg.vector_norm(lengths, dim=-2, keepdim=True, dtype=clipping.wide_dtype(u.device))
    return norm


def _divided(u: Tensor, dtype: torch.dtype, *divisors: Tensor) -> Tensor:
    """u over one number a matrix after the other."""
    x = _scratch.empty(_scratch.X, u.shape, dtype, u.device)
    for block in row_blocks(u):
        part = u[block]
        for divisor in divisors:
            part = part / divisor[block[0]].to(u.dtype)
        x[block] = part
    return x


def standard_form(x: Tensor, coefficients: Sequence[Coefficients], products: Products = BY_TORCH) -> Tensor:
    """One quintic after the other on X, which has no more rows than columns."""
    for triple in coefficients:
        x = quintic(x, triple, products)
    return x


def quintic(x: Tensor, coefficients: Coefficients, products: Products = BY_TORCH) -> Tensor:
    """aX + (bA + cA²)X with A = XXᵀ."""
    a, b, c = coefficients
    if products is BY_TORCH and _symmetric.pays(x):
        r, z = _symmetric.buffers(x, 2)
        r.become_gram_(x)
        return multiplied(z.add_multiple_(r, r, r, b, c).plus_identity_(a).whole, x)
    gram = products.gram(x)
    q = products.add_multiple(gram, gram, gram, b, c)
    del gram
    return multiplied(q, x, a)


def multiplied(q: Tensor, x: Tensor, beta: float = 0.0) -> Tensor:
    """βX + QX, laid out as X is: a tall matrix that is seen transposed stays contiguous.

    Q is symmetric, or given as it multiplies what lies in memory: transposed where X `is_seen_transposed`.
    """
    tall = is_seen_transposed(x)
    if torch.compiler.is_compiling():
        return torch.baddbmm(x, q.mT if tall else q, x, beta=beta)
    laid_out = x.mT if tall else x
    found = _scratch.beside(x, laid_out.shape)
    left, right = (laid_out, q) if tall else (q, laid_out)
    square = x.shape[-2] == x.shape[-1]
    for part in _symmetric.halves(x.shape[-1]) if square and _symmetric.by_tiles(x) else [slice(None)]:
        torch.baddbmm(laid_out[:, part], left[:, part], right, beta=beta, out=found[:, part])
    return found.mT if tall else found


def is_seen_transposed(x: Tensor) -> bool:
    """Whether the columns of X lie together in memory."""
    return x.stride(-1) > x.stride(-2)


def gram_form(
    x: Tensor, coefficients: Sequence[Coefficients], products: Products = BY_TORCH, inverse: Tensor | None = None
) -> Tensor:
    """The same polynomial from the small matrix R = XXᵀ alone (Dao-AILab 2026): all but few products are square.

    With Z = bR + cR² an iteration multiplies X by aI + Z and R by its square. The multipliers are gathered in Q, which
    X takes up at a restart and at the end. X need not be normalised: with the ``inverse`` of the norm of each matrix,
    (B,), R is multiplied by its square and the first Q by itself.

    All commute, but for their rounding: what a multiplier adds to small singular values by it, those behind it enlarge
    up to a hundredfold. So Q takes up each from the left, in the order in which X would. From the third one on, which
    is when it matters, the product is not made symmetric either, for that is half of the wrong order (384 × 640, five
    iterations in bfloat16, singular values from 1 to 1e-3: error 0.18 instead of 0.37; half of them 0: 0.23, not 0.95).
    """
    starts = restarts(len(coefficients))
    by_panels = products is BY_TORCH and inverse is None and _symmetric.pays(x)
    for first, last in zip((0, *starts), (*starts, len(coefficients)), strict=True):
        own = coefficients[first:last]
        q = _multiplier_by_panels(x, own) if by_panels else _multiplier(x, own, products, None if first else inverse)
        x = multiplied(q, x)
    return x


def _multiplier(
    x: Tensor, coefficients: Sequence[Coefficients], products: Products, inverse: Tensor | None
) -> Tensor:
    """Q, as it multiplies what X lies in, after iterations that start from R = XXᵀ and Q = I."""
    r = products.gram(x, None if inverse is None else inverse.square())
    tall = is_seen_transposed(x)
    a, b, c = coefficients[0]
    z, q = products.add_multiple(r, r, r, b, c), None
    for i, following in enumerate(coefficients[1:], 2):
        r = products.add_multiple(r, r, z, a)
        r = products.add_multiple(r, z, r, a)
        q = _symmetric.plus_identity_(z, a) if q is None else q
        a, b, c = following
        z = products.add_multiple(r, r, r, b, c)
        scale = inverse if i == len(coefficients) else None
        q = products.add_multiple(q, *_in_order(z, q, tall), a, scale=scale, symmetric=i == 2)
    return _scaled(_symmetric.plus_identity_(z, a), inverse) if q is None else q


Factor = TypeVar("Factor")


def _in_order(multiplier: Factor, q: Factor, tall: bool) -> tuple[Factor, Factor]:
    """Left and right factor of a Q that takes up another multiplier; of its transpose, if X is seen transposed."""
    return (q, multiplier) if tall else (multiplier, q)


def _multiplier_by_panels(x: Tensor, coefficients: Sequence[Coefficients]) -> Tensor:
    """The same, the symmetric products by panels.

    With Y = aI + Z the products are RY, Y(RY) and YQ, and add nothing: on a CPU what is added to would be copied first.
    """
    r, y, product, q = _symmetric.buffers(x, 4)
    r.become_gram_(x)
    tall = is_seen_transposed(x)
    for i, (a, b, c) in enumerate(coefficients):
        y.add_multiple_(r, r, r, b, c).plus_identity_(a)
        if i + 1 < len(coefficients):
            r.multiply_(y, product.multiply_(r, y))
        if i:
            q, product = product.multiply_(*_in_order(y, q, tall), symmetric=i == 1), q
        else:
            q, y = y, q
    return q.whole
