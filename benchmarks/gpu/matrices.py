"""Orthogonalised steps of whole models' matrices, and the symmetric products that they consist of."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import thorn, timing
from benchmarks.contenders import Build
from benchmarks.gpu import peers, shapes
from benchmarks.gpu.steps import given, stepping
from benchmarks.gpu.works import Accuracy, Entry, Subject, Work
from trysquare import THORN, _backend

OURS, MUON, GRAM, DION = "THORN", "torch.optim.Muon", "gram-newton-schulz Muon", "dion Muon"
TRANSPOSED, OUR_TRANSPOSED = "cuBLAS, XXᵀ", "trysquare, XXᵀ"
SQUARED, OUR_SQUARED = "cuBLAS, bA + cA²", "trysquare, bA + cA²"
B, C = -4.775, 2.0315
ROTATED, IN_A_ROW = 3, 12
KERNELS = "trysquare.kernels.polar"


def model(name: str, title: str, sizes: tuple[shapes.Shape, ...], device: torch.device, backend: str) -> Work:
    """The matrices of a model, stepped by those who orthogonalise."""
    distinct = tuple(dict.fromkeys(sizes))
    rows: tuple[tuple[str, Build, Build, str | None], ...] = (
        (MUON, _muon, _muons_factor, peers.without_muon()),
        (OURS, lambda p: thorn.over(p, True, backend), functools.partial(_thorns_factor, backend=backend), None),
        (GRAM, _gram, _grams_factor, peers.GRAM.missing()),
        (DION, _dion, _dions_factor, peers.DION.missing()),
    )
    entries = (
        Entry(
            row,
            stepping(build),
            functools.partial(polar_error, seen, distinct, device),
            missing=missing,
            ours=row == OURS,
        )
        for row, build, seen, missing in rows
    )
    whole = f"{title}: {len(sizes)} matrices, {shapes.count(sizes):,} float32 parameters"
    return Work(name, whole, "largest relative distance to the polar factor", given(sizes, device), tuple(entries))


def polar_error(build: Build, distinct: tuple[shapes.Shape, ...], device: torch.device) -> Accuracy:
    """Relative Frobenius distance of a first step from zero to the polar factor, of the worst shape.

    A step of learning rate 1 without momentum, decay and scale is minus the polar factor of the gradient.
    """
    return Accuracy(max(_distance(build, shape, device) for shape in distinct))


def _distance(build: Build, shape: shapes.Shape, device: torch.device) -> float:
    u, exact = _gaussian(shape, device)
    parameter = torch.nn.Parameter(torch.zeros_like(u))
    parameter.grad = u.clone()
    build([parameter]).step()
    return float(torch.linalg.norm(-parameter.detach() - exact) / torch.linalg.norm(exact))


@functools.cache
def _gaussian(shape: shapes.Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and its polar factor by the singular value decomposition."""
    u = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)
    left, _, right = torch.linalg.svd(u, full_matrices=False)
    return u, left @ right


def _unscaled(parameters: list[torch.nn.Parameter]) -> float:
    """The rate with which √max(1, R/C) comes to 1."""
    rows, columns = parameters[0].shape
    return max(1.0, rows / columns) ** -0.5


def _thorns_factor(parameters: list[torch.nn.Parameter], backend: str) -> torch.optim.Optimizer:
    groups = [{"params": parameters, "orthogonalize": True}]
    settings: dict[str, Any] = {"betas": (0.0, 0.0), "weight_decay": 0.0, "target_rms": 0.0, "rectify": False}
    return THORN(groups, lr=_unscaled(parameters), backend=backend, **settings)


def _muon(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon(parameters, lr=1e-3)


def _muons_factor(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon(parameters, lr=_unscaled(parameters), weight_decay=0.0, momentum=0.0, nesterov=False)


def _gram(parameters: list[torch.nn.Parameter]) -> Any:
    from gram_newton_schulz import Muon

    return Muon(parameters, lr=1e-3, **_with_kernels(parameters))


def _grams_factor(parameters: list[torch.nn.Parameter]) -> Any:
    from gram_newton_schulz import Muon

    without: dict[str, Any] = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False, "adjust_lr": None}
    return Muon(parameters, lr=1.0, **without, **_with_kernels(parameters))


def _with_kernels(parameters: list[torch.nn.Parameter]) -> dict[str, Any]:
    """As its README has it; its kernels are for a GPU."""
    return {"ns_use_kernels": parameters[0].is_cuda, "gram_newton_schulz_restart_iterations": [2]}


def _dion(parameters: list[torch.nn.Parameter]) -> Any:
    from dion import Muon

    return Muon(parameters, lr=1e-3, use_triton=parameters[0].is_cuda)


def _dions_factor(parameters: list[torch.nn.Parameter]) -> Any:
    from dion import Muon

    without: dict[str, Any] = {"weight_decay": 0.0, "mu": 0.0, "adjust_lr": None}
    return Muon(parameters, lr=1.0, use_triton=parameters[0].is_cuda, **without)


# The products


def products(size: shapes.Shape, device: torch.device) -> Work:
    """XXᵀ and bA + cA² of batches of bfloat16 matrices: whole by cuBLAS, half of them mirrored by our kernel."""
    missing = _without_kernels(device)
    rows: tuple[tuple[str, Callable[[torch.Tensor], torch.Tensor], str | None], ...] = (
        (TRANSPOSED, _transposed, None),
        (OUR_TRANSPOSED, lambda x: _kernels(x.shape[-2], x.device).gram(x), missing),
        (SQUARED, _squared, None),
        (OUR_SQUARED, lambda x: _kernels(x.shape[-2], x.device).add_multiple(x, x, x, B, C), missing),
    )
    entries = (
        Entry(
            name,
            functools.partial(_multiplying, product),
            functools.partial(_product_error, product, size, device, squared=name in {SQUARED, OUR_SQUARED}),
            missing=absent,
            ours=name in {OUR_TRANSPOSED, OUR_SQUARED},
        )
        for name, product, absent in rows
    )
    title = "{} products in a row of {} matrices of {} × {}, bfloat16".format(IN_A_ROW, *size)
    inputs = functools.cache(lambda: [_symmetric(size, device, seed) for seed in range(ROTATED)])
    return Work("products", title, "relative distance to the float64 product", inputs, tuple(entries))


def _without_kernels(device: torch.device) -> str | None:
    """Why they cannot run, or None."""
    if importlib.util.find_spec(KERNELS) is None:
        return f"not available: this trysquare has no {KERNELS}"
    reason = _backend.triton_missing(device)
    return None if reason is None else f"not available: {reason}"


@functools.cache
def _kernels(rows: int, device: torch.device) -> Any:
    return importlib.import_module(KERNELS).Products(rows, torch.bfloat16, device)


def _multiplying(product: Callable[[torch.Tensor], torch.Tensor], inputs: list[torch.Tensor]) -> Subject:
    """So many in a row, as in a step: of a single one, half a millisecond long, the way to the GPU is a part."""
    once = timing.rotated(product, inputs)

    def in_a_row() -> None:
        for _ in range(IN_A_ROW):
            once()

    return Subject(in_a_row)


def _symmetric(size: shapes.Shape, device: torch.device, seed: int) -> torch.Tensor:
    """XXᵀ/n of a Gaussian X, rounded: what both kinds of products meet in an iteration."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(size, generator=generator, device=device)
    return (x @ x.mT / size[-1]).to(torch.bfloat16)


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x @ x.mT


def _squared(x: torch.Tensor) -> torch.Tensor:
    return torch.baddbmm(x, x, x, beta=B, alpha=C)


def _product_error(
    product: Callable[[torch.Tensor], torch.Tensor], size: shapes.Shape, device: torch.device, *, squared: bool
) -> Accuracy:
    x = _symmetric((1, *size[1:]), device, 0)
    exact = (_squared if squared else _transposed)(x.double())
    return Accuracy(float(torch.linalg.norm(product(x).double() - exact) / torch.linalg.norm(exact)))
