"""The loss-aware schedule, step by step by hand."""

import math

import pytest

from trysquare_conformance.budget import assert_same
from trysquare_reference.loss_schedule import LossSchedule, update


def after(losses: list[float], beta: float = 0.5, schedule: LossSchedule | None = None) -> LossSchedule:
    schedule = schedule or LossSchedule()
    for loss in losses:
        schedule = update(schedule, loss, beta)
    return schedule


def test_a_sequence_by_hand() -> None:
    schedule = LossSchedule()
    # loss, then: running mean (β = ½), stalls, factor
    expected = [
        (4.0, 4.0, 1, 1.0),  # the first loss is the mean and therefore stalls
        (2.0, 3.0, 0, 1.0),  # 2 < 4
        (3.0, 3.0, 1, 1.0),  # 3 ≥ 3
        (5.0, 4.0, 2, 1.0),
        (6.0, 5.0, 3, 1.0),
        (7.0, 6.0, 4, 1.0),
        (8.0, 7.0, 0, 0.99),  # the fifth stall in a row
        (9.0, 8.0, 1, 0.99),
        (0.0, 4.0, 0, 0.99),
    ]
    for loss, mean, stalls, scale in expected:
        schedule = update(schedule, loss, 0.5)
        assert schedule == LossSchedule(mean, stalls, scale)


def test_every_fifth_stall_lowers_the_rate_by_a_hundredth() -> None:
    assert_same(after([1.0] * 50).loss_lr_scale, 0.99**10)
    assert after([1.0] * 49).stall_count == 4


def test_a_loss_just_below_the_mean_still_stalls() -> None:
    start = LossSchedule(loss_ema=1.0)
    assert update(start, 1.0 - 0.9e-8, 0.5).stall_count == 1
    assert update(start, 1.0 - 1.1e-8, 0.5).stall_count == 0


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("start", [LossSchedule(), LossSchedule(2.0, 4, 0.99)])
def test_a_loss_that_is_not_finite_changes_nothing(loss: float, start: LossSchedule) -> None:
    assert update(start, loss, 0.98) == start


def test_without_memory_the_mean_is_the_last_loss() -> None:
    assert after([5.0, 3.0, 4.0], beta=0.0) == LossSchedule(4.0, 1, 1.0)


def test_a_falling_loss_never_lowers_the_rate() -> None:
    assert after([1 / t for t in range(1, 100)], beta=0.98).loss_lr_scale == 1
