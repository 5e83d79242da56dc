"""Every public function of every reference page on noisy arrays: the same result up to noise, and noise everywhere."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import trysquare_reference
from trysquare_conformance.noise import FLOAT32
from trysquare_conformance.noisy import Noisy, wrapper
from trysquare_reference import (
    blockwise8bit,
    clipping,
    decay,
    dolphinflow,
    dolphinflow8bit,
    moments,
    polar,
    polar_express,
    projection,
    row_norm,
    schedule_free,
    stablemax,
    thorn,
)

U = FLOAT32.elementwise
DRAWS = 4  # as many as X has rows, so that a draw taken for a row would fit, and show
Wrap = Callable[[Any], Any]


def source() -> Wrap:
    return wrapper(FLOAT32, np.random.default_rng(0), DRAWS)


def gaussian(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(np.float64)


X, W, PER_ROW = gaussian(4, 3), gaussian(4, 3, seed=1), np.array([0, 2, 1, 2])
SHARES = np.abs(X) / np.sum(np.abs(X), axis=1, keepdims=True)
HP = dolphinflow.Hyperparameters()


def _dolphinflow(wrap: Wrap, **settings: Any) -> Any:
    hp = dolphinflow.Hyperparameters(**settings)
    theta = [wrap(X), wrap(X[0])]
    return dolphinflow.step(theta, [wrap(W), wrap(W[0])], [dolphinflow.init(t, hp) for t in theta], hp)


def _thorn(wrap: Wrap, **settings: Any) -> Any:
    hp = thorn.Hyperparameters(**settings)
    state = thorn.init(wrap(X), hp)
    theta = wrap(X)
    for g in (W, X):
        (theta,), (state,) = thorn.step([theta], [wrap(g)], [state], hp)
    return theta, state


def _micro_step(wrap: Wrap, **settings: Any) -> Any:
    hp = thorn.Hyperparameters(update_rate=2, **settings)
    return thorn.release_step(wrap(X), wrap(W), thorn.init(wrap(X), hp), hp)


GROUPS: list[dict[str, Any]] = [
    {"orthogonalize": orthogonalize, "schedule_free": schedule_free, "betas": betas}
    for orthogonalize, schedule_free in ((True, True), (False, True), (False, False))
    for betas in ((0.9, 0.95), (0.0, 0.0))
]


LARGE = dolphinflow8bit.SMALLEST_CODED // 8
CODED = gaussian(8, LARGE, seed=2)
QMAP, HP8BIT = blockwise8bit.dynamic_map(signed=True), dolphinflow8bit.Hyperparameters()


def _dolphinflow8bit(wrap: Wrap, **settings: Any) -> Any:
    """What is not a code: codes are integers, where noise ends."""
    hp = dolphinflow8bit.Hyperparameters(**settings)
    theta = [wrap(X), wrap(CODED)]
    states = [dolphinflow8bit.init(x, hp) for x in (X, CODED)]
    stepped, after = dolphinflow8bit.step(theta, [wrap(W), wrap(CODED[::-1])], states, hp)
    return stepped, after[0], [after[1][name] for name in after[1] if name.startswith("absmax")]


CALLS: dict[str, Callable[[Wrap], Any]] = {
    "blockwise8bit.midpoints": lambda wrap: blockwise8bit.midpoints(wrap(QMAP)),
    "blockwise8bit.blocks": lambda wrap: blockwise8bit.blocks(wrap(X)),
    "blockwise8bit.unblocked": lambda wrap: blockwise8bit.unblocked(wrap(X), (3, 2)),
    "blockwise8bit.block_absmax": lambda wrap: blockwise8bit.block_absmax(wrap(CODED)),
    "blockwise8bit.scaled": lambda wrap: blockwise8bit.scaled(wrap(X), wrap(np.array([5.0]))),
    "blockwise8bit.quantize": lambda wrap: blockwise8bit.quantize(wrap(X * X), QMAP)[1],
    "blockwise8bit.dequantize": lambda wrap: blockwise8bit.dequantize(PER_ROW, wrap(np.array([5.0])), QMAP),
    "blockwise8bit.error_bound": lambda wrap: blockwise8bit.error_bound(PER_ROW, wrap(np.array([5.0])), QMAP),
    "dolphinflow8bit.init": lambda wrap: dolphinflow8bit.init(wrap(X), HP8BIT),
    "dolphinflow8bit.store": lambda wrap: dolphinflow8bit.store(wrap(CODED), 1)["absmax1"],
    "dolphinflow8bit.load": lambda wrap: dolphinflow8bit.load(
        {**dolphinflow8bit.store(CODED, 1), "absmax1": wrap(np.ones(16))}, 1
    ),
    "dolphinflow8bit.update_moments": lambda wrap: dolphinflow8bit.update_moments(
        wrap(X), wrap(W), dolphinflow8bit.init(wrap(X), HP8BIT), HP8BIT
    ),
    "dolphinflow8bit.step": lambda wrap: [
        _dolphinflow8bit(wrap, ortho_mode=mode, adaptive_lr=adaptive)
        for mode in ("vector", "matrix", None)
        for adaptive in (True, False)
    ],
    "projection.project_rows": lambda wrap: projection.project_rows(wrap(X), wrap(W)),
    "projection.project_update_rows": lambda wrap: projection.project_update_rows(wrap(X), wrap(W), 1e-8),
    "clipping.global_norm": lambda wrap: clipping.global_norm([wrap(X), wrap(W)]),
    "clipping.clip_scale": lambda wrap: clipping.clip_scale([wrap(X), wrap(W)], 1.0),
    "moments.nesterov": lambda wrap: moments.nesterov(wrap(X), wrap(W), 0.9),
    "moments.second_moment": lambda wrap: moments.second_moment(wrap(X * X), wrap(W), 0.99),
    "moments.adapt": lambda wrap: [moments.adapt(wrap(X), wrap(W * W), 3, 0.99, 1e-8, b) for b in (True, False)],
    "moments.bias_corrected": lambda wrap: [moments.bias_corrected(wrap(X), beta, 2) for beta in (0.95, 0.0)],
    "polar.newton_schulz": lambda wrap: [polar.newton_schulz(wrap(x), 5, 1e-8) for x in (X, X.T, X.reshape(2, 2, 3))],
    "decay.decoupled_decay": lambda wrap: decay.decoupled_decay(wrap(X), 0.1, 0.1),
    "decay.cautious_decay": lambda wrap: decay.cautious_decay(wrap(X), wrap(W), 0.1),
    "polar.polar_factor": lambda wrap: [
        polar.polar_factor(wrap(x), polar_express.coefficients(), 0.02, 1e-8, form)
        for x in (X, X.T, X.reshape(2, 2, 3))
        for form in ("standard", "gram")
    ],
    "row_norm.normalize_rows": lambda wrap: row_norm.normalize_rows(wrap(X), wrap(X[:, :1] ** 2), 0.95, 1e-8),
    "schedule_free.average": lambda wrap: schedule_free.average(wrap(X), wrap(W), 0.3),
    "schedule_free.averaged": lambda wrap: schedule_free.averaged(wrap(X), wrap(W), 0.9),
    "schedule_free.explicit_step": lambda wrap: schedule_free.explicit_step(
        wrap(X), wrap(W), wrap(X * W), 0.1, 0.3, 0.9
    ),
    "schedule_free.step": lambda wrap: schedule_free.step(wrap(X), wrap(W), wrap(X * W), 0.1, 0.3, 0.9),
    "thorn.init": lambda wrap: [
        thorn.init(wrap(X), thorn.Hyperparameters(**group), half=True) for group in GROUPS if not group["orthogonalize"]
    ],
    "thorn.step": lambda wrap: [_thorn(wrap, weight_decay=decay, **group) for group in GROUPS for decay in (0.0, 0.1)],
    "thorn.release_step": lambda wrap: [_micro_step(wrap, **group) for group in GROUPS],
    "thorn.accumulate": lambda wrap: [
        thorn.accumulate(wrap(W), thorn.init(wrap(X), hp), hp)
        for hp in (thorn.Hyperparameters(**group) for group in GROUPS if not group["orthogonalize"])
    ],
    "thorn.mean": lambda wrap: [
        thorn.mean(wrap(X), thorn.init(wrap(W), hp), hp) for hp in (thorn.Hyperparameters(**group) for group in GROUPS)
    ],
    "dolphinflow.init": lambda wrap: dolphinflow.init(wrap(X), HP),
    "dolphinflow.step": lambda wrap: [
        _dolphinflow(wrap, ortho_mode=mode, project=project, adaptive_lr=adaptive)
        for mode in ("vector", "matrix", None)
        for project in ("gradient", "update")
        for adaptive in (True, False)
    ],
    "stablemax.s": lambda wrap: stablemax.s(wrap(X)),
    "stablemax.s_slope": lambda wrap: stablemax.s_slope(wrap(X)),
    "stablemax.log_s": lambda wrap: stablemax.log_s(wrap(X)),
    "stablemax.log_s_slope": lambda wrap: stablemax.log_s_slope(wrap(X)),
    "stablemax.stablemax": lambda wrap: stablemax.stablemax(wrap(X)),
    "stablemax.log_stablemax": lambda wrap: stablemax.log_stablemax(wrap(X)),
    "stablemax.stablemax_gradient": lambda wrap: stablemax.stablemax_gradient(wrap(X), wrap(W)),
    "stablemax.log_stablemax_gradient": lambda wrap: stablemax.log_stablemax_gradient(wrap(X), wrap(W)),
    "stablemax.cross_entropy": lambda wrap: [
        stablemax.cross_entropy(wrap(X), target, reduction=reduction)
        for target in (PER_ROW, wrap(SHARES))
        for reduction in ("mean", "sum", "none")
    ],
    "stablemax.cross_entropy_gradient": lambda wrap: [
        stablemax.cross_entropy_gradient(wrap(X), target, wrap(np.abs(W[0])), label_smoothing=0.1)
        for target in (PER_ROW, wrap(SHARES))
    ],
    "stablemax.probability_gradients": lambda wrap: stablemax.probability_gradients(wrap(X), wrap(SHARES)),
    "stablemax.coefficients": lambda wrap: stablemax.coefficients(wrap(X), wrap(SHARES), None, -100, 0.1),
    "stablemax.denominator": lambda wrap: stablemax.denominator(wrap(X), PER_ROW, wrap(np.abs(W[0])), -100),
}
"""Every public function of every page, with all its inputs noisy."""

WITHOUT_ARRAYS = {
    "blockwise8bit.dynamic_map",
    "blockwise8bit.interval",
    "blockwise8bit.nearest",
    "loss_schedule.update",
    "polar_express.coefficients",
    "polar_express.quintic",
    "rectification.rectification",
    "schedule_free.weigh",
    "stablemax.class_axis",
    "thorn.scale",
}
NUMBERS = {"step", "lr_max", "weight_sum"}  # of a state: float64 whatever the precision


def public_functions() -> Iterator[str]:
    for page in pkgutil.iter_modules(trysquare_reference.__path__):
        if not page.name.startswith("_"):
            module = importlib.import_module(f"trysquare_reference.{page.name}")
            for name, function in inspect.getmembers(module, inspect.isfunction):
                if inspect.unwrap(function).__module__ == module.__name__ and not name.startswith("_"):
                    yield f"{page.name}.{name}"


def leaves(result: Any) -> Iterator[Any]:
    if isinstance(result, (list, tuple)):
        for part in result:
            yield from leaves(part)
    elif isinstance(result, dict):
        yield from leaves([value for name, value in result.items() if name not in NUMBERS])
    else:
        yield result


def test_every_function_of_every_page_is_called_here() -> None:
    assert set(CALLS) == set(public_functions()) - WITHOUT_ARRAYS


@pytest.mark.parametrize("function", CALLS)
def test_the_noise_survives_to_every_output_of_every_page(function: str) -> None:
    outputs = list(leaves(CALLS[function](source())))
    assert outputs
    assert all(type(x) is Noisy for x in outputs), [type(x) for x in outputs]


@pytest.mark.parametrize("function", CALLS)
def test_a_noisy_page_computes_what_the_plain_page_does_in_every_draw(function: str) -> None:
    plain: Any = np.asarray
    for exact, x in zip(leaves(CALLS[function](plain)), leaves(CALLS[function](source())), strict=True):
        assert np.asarray(x).shape == (DRAWS, *np.shape(exact))
        scale = np.max(np.abs(np.asarray(exact)))
        assert np.max(np.abs(np.asarray(x) - exact)) <= 2000 * U * scale
