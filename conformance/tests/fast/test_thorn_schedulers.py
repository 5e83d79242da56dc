"""Every scheduler of torch drives THORN, except that nothing may cycle the β₁ of an average."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

from trysquare import THORN
from trysquare_conformance.behaviour import all_parameters, bits, progress, run
from trysquare_conformance.behaviour_thorn import KINDS, thorn

STEPS = 6
Make = Callable[[torch.optim.Optimizer], Any]
WITHOUT_AVERAGES = ("matrices", "adam")

SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=3, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS + 1, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=4),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


@pytest.fixture(autouse=True)
def _torchs_own_warnings() -> Iterator[None]:
    """SequentialLR calls the others in a way that torch itself deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step", category=UserWarning)
        yield


@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01)], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_drives_every_group(name: str, rate: Any) -> None:
    """As if a hand had written the same rates."""
    optimizer, manual = (thorn(lr=rate.clone() if isinstance(rate, torch.Tensor) else rate) for _ in range(2))
    scheduler, seen = SCHEDULERS[name](optimizer), set()
    for step in range(STEPS):
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        for group, own in zip(manual.param_groups, rates, strict=True):
            group["lr"] = torch.tensor(own) if isinstance(rate, torch.Tensor) else own
        seen.add(rates[0])
        run(optimizer, 1, first=step)
        run(manual, 1, first=step)
        scheduler.step(*[1.0] if name == "ReduceLROnPlateau" else [])
    assert len(seen) > 1
    assert progress(optimizer)["state"] == progress(manual)["state"]
    assert progress(optimizer)["parameters"] == progress(manual)["parameters"]


CYCLING: dict[str, Make] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=3),
}


@pytest.mark.parametrize("name", CYCLING)
def test_a_scheduler_that_cycles_momentum_is_told_not_to(name: str) -> None:
    """Both do so unless they are told; the first step, with what they begin with, is still right."""
    optimizer = thorn()
    scheduler = CYCLING[name](optimizer)
    run(optimizer, 1)
    scheduler.step()
    before = [bits(p) for p in all_parameters(optimizer)]
    with pytest.raises(ValueError, match=r"group 3: betas=.* which cannot change; .* use cycle_momentum=False"):
        run(optimizer, 1)
    assert [bits(p) for p in all_parameters(optimizer)] == before


@pytest.mark.parametrize("name", CYCLING)
def test_where_nothing_is_averaged_momentum_may_cycle(name: str) -> None:
    optimizer = thorn(WITHOUT_AVERAGES)
    scheduler, seen = CYCLING[name](optimizer), set()
    for step in range(STEPS):
        seen.add(optimizer.param_groups[0]["betas"][0])
        run(optimizer, 1, first=step)
        scheduler.step()
    assert len(seen) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_of_zero_moves_nothing(kind: str) -> None:
    """Nor does a mean of which every point weighs nothing become NaN; a warmup begins so."""
    optimizer = thorn((kind,), lr=0.0)
    before = [bits(p) for p in all_parameters(optimizer)]
    run(optimizer, 2)
    assert [bits(p) for p in all_parameters(optimizer)] == before
    optimizer.param_groups[0]["lr"] = 0.01
    run(optimizer, 8, first=2)
    with optimizer.averaged():
        assert all(p.isfinite().all() for p in all_parameters(optimizer))
    assert [bits(p) for p in all_parameters(optimizer)] != before


def test_the_largest_rate_so_far_weighs() -> None:
    """After a decay each z counts as much as at the peak, so that the mean does not stand still."""
    optimizer = THORN([{"params": [torch.nn.Parameter(torch.ones(3))], "orthogonalize": False}], lr=0.5)
    (p,) = all_parameters(optimizer)
    run(optimizer, 1)
    optimizer.param_groups[0]["lr"] = 0.125
    run(optimizer, 3)
    assert optimizer.state[p]["lr_max"] == 0.5
    assert optimizer.state[p]["weight_sum"] == 4 * 0.25
