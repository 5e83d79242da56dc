"""What is left of 1 − βᵗ has lost digits, and honest code may lose others than the reference: the budget knows."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from trysquare_conformance.budget import STORED, Array, Budget, Wrap, judge, measure
from trysquare_conformance.noise import FLOAT32, FLOAT64, Arithmetic
from trysquare_reference import dolphinflow, dolphinflow8bit, moments, thorn

Power = Callable[[float, int], float]
RNG = np.random.default_rng(0)
SIZE = 4096  # errors of their own average out in the norm of so many entries, and the one that all share is seen
G, M, V = RNG.standard_normal(SIZE), RNG.standard_normal(SIZE), RNG.standard_normal(SIZE) ** 2
ONLY_ADAM: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.0, "ortho_mode": None, "gradient_clipping": None}


def _dolphinflow(beta: float, step: int, wrap: Wrap) -> Array:
    hp = dolphinflow.Hyperparameters(**ONLY_ADAM, momentum=beta, beta2=beta)
    state = {"step": step - 1, "momentum_buffer": wrap(M), "exp_avg_sq": wrap(V)}
    (theta,), _ = dolphinflow.step([wrap(np.zeros(SIZE))], [wrap(G)], [state], hp)
    return -theta


def _dolphinflow8bit(beta: float, step: int, wrap: Wrap) -> Array:
    hp = dolphinflow8bit.Hyperparameters(**ONLY_ADAM, momentum=beta, beta2=beta)
    state = {"step": step - 1, "state1": wrap(M), "state2": wrap(V)}
    (theta,), _ = dolphinflow8bit.step([wrap(np.zeros(SIZE))], [wrap(G)], [state], hp)
    return -theta


def _thorn(beta: float, step: int, wrap: Wrap, schedule_free: bool = False) -> Array:
    hp = thorn.Hyperparameters(betas=(beta, beta), orthogonalize=False, schedule_free=schedule_free)
    u, _ = thorn.accumulate(wrap(G), {"step": step - 1, "exp_avg": wrap(M), "exp_avg_sq": wrap(V)}, hp)
    return u


def _schedule_free(beta: float, step: int, wrap: Wrap) -> Array:
    return _thorn(beta, step, wrap, schedule_free=True)


def _momentum(beta: float, _: float) -> Array:
    return G + beta * (beta * M + G)


def _mean(beta: float, weight: float) -> Array:
    return (beta * M + (1 - beta) * G) / weight


PAGES: dict[str, tuple[Callable[[float, int, Wrap], Array], Callable[[float, float], Array]]] = {
    "dolphinflow": (_dolphinflow, _momentum),
    "dolphinflow8bit": (_dolphinflow8bit, _mean),
    "thorn, adam": (_thorn, _mean),
    "thorn, schedule-free": (_schedule_free, lambda _, __: G),
}
"""An update of each page that corrects a bias, and what it divides by the root of the second moment."""


def by_exp2(beta: float, step: int) -> float:
    """As a kernel takes it, from the base-2 logarithm of β."""
    return float(np.exp2(step * math.log2(beta)))


def above(beta: float, step: int) -> float:
    """An ulp too large, which a library may be."""
    return math.nextafter(beta**step, math.inf)


def below(beta: float, step: int) -> float:
    return math.nextafter(beta**step, 0)


def updated(page: str, beta: float, step: int, power: Power) -> Array:
    """The update with βᵗ from elsewhere."""
    weight = 1 - power(beta, step)
    return PAGES[page][1](beta, weight) / (np.sqrt((beta * V + (1 - beta) * G**2) / weight) + 1e-8)


def budget(run: Callable[[Wrap], Array], arithmetic: Arithmetic = FLOAT64) -> Budget:
    return measure(lambda wrap: {"u": run(wrap)}, arithmetic, {"u": STORED[arithmetic.name]}, seed=0)["u"]


def of_page(page: str, beta: float, step: int) -> Budget:
    return budget(lambda wrap: PAGES[page][0](beta, step, wrap))


def test_two_ways_to_take_the_power_part_where_terms_cancel() -> None:
    weights = [1 - power(0.95, 2) for power in (pow, by_exp2)]
    assert abs(weights[1] / weights[0] - 1) > 8 * STORED["float64"].unit_roundoff


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("beta", [0.5, 0.9, 0.95, 0.99, 0.999])
def test_any_honest_power_is_right_in_float64(page: str, beta: float) -> None:
    for step in (1, 2, 3, 5, 10, 100, 1000):
        allowed = of_page(page, beta, step)
        for power in (pow, by_exp2, above, below):
            assert judge(allowed, updated(page, beta, step, power)).right, step


@pytest.mark.parametrize("page", PAGES)
def test_a_power_that_is_little_wrong_is_wrong_in_float64(page: str) -> None:
    for step in (2, 10):
        faulty = updated(page, 0.95, step, lambda beta, t: by_exp2(beta, t) * (1 + 2.0**-44))
        assert not judge(of_page(page, 0.95, step), faulty).right


@pytest.mark.parametrize("step", [1, 2, 100])
def test_the_budget_of_float32_is_that_of_a_correction_rounded_once(step: int) -> None:
    corrected = budget(lambda wrap: moments.bias_corrected(wrap(M), 0.999, step), FLOAT32)
    divided = budget(lambda wrap: wrap(M) / (1 - 0.999**step), FLOAT32)
    assert 0.7 < corrected.norm / divided.norm < 1.4
    assert 0.7 < np.mean(corrected.element) / np.mean(divided.element) < 1.4
