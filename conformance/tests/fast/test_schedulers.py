"""Every scheduler of torch drives the optimizer, with a float or a tensor as learning rate, and so does a hand."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

from trysquare import DolphinFlow
from trysquare_conformance.behaviour import all_parameters, bits, parameters, progress, run

STEPS = 8
Make = Callable[[torch.optim.Optimizer], Any]

SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=3),
    "CyclicLR without momentum": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=3, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.StepLR(o, 2)], optimizer=o
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}
CYCLING = ("CyclicLR", "OneCycleLR")


@pytest.fixture(autouse=True)
def _torchs_own_warnings() -> Iterator[None]:
    """SequentialLR calls the others in a way that torch itself deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step", category=UserWarning)
        yield


def optimizer_of(lr: Any) -> DolphinFlow:
    first, *rest = parameters([(4, 3), (3,)])
    return DolphinFlow([{"params": rest}, {"params": [first], "weight_decay": 0.1}], lr=lr)


def scheduled(name: str, lr: Any) -> tuple[DolphinFlow, list[list[dict[str, float]]]]:
    """A run under a scheduler, and what it wrote into the groups before each step."""
    optimizer = optimizer_of(lr)
    scheduler = SCHEDULERS[name](optimizer)
    seen = []
    for step in range(STEPS):
        seen.append([{key: kept(group[key]) for key in ("lr", "momentum")} for group in optimizer.param_groups])
        run(optimizer, 1, first=step)
        scheduler.step(*[1.0] if name == "ReduceLROnPlateau" else [])
    return optimizer, seen


def kept(value: Any) -> Any:
    """A tensor as it is now. (Some schedulers write into it, others put a new one or a float in its place.)"""
    return value.clone() if isinstance(value, torch.Tensor) else value


def by_hand(seen: list[list[dict[str, Any]]], lr: Any) -> DolphinFlow:
    """The same values written into the groups by a user."""
    optimizer = optimizer_of(lr)
    for step, groups in enumerate(seen):
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group |= {key: kept(value) for key, value in values.items()}
        run(optimizer, 1, first=step)
    return optimizer


RATES: dict[str, Callable[[], Any]] = {
    "float": lambda: 0.01,
    "float32 tensor": lambda: torch.tensor(0.01),
    "float64 tensor": lambda: torch.tensor(0.01, dtype=torch.float64),
}


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_drives_every_group(name: str, rate: str) -> None:
    optimizer, seen = scheduled(name, RATES[rate]())
    assert len({float(groups[0]["lr"]) for groups in seen}) > 1
    assert (len({groups[0]["momentum"] for groups in seen}) > 1) == (name in CYCLING)
    manual = by_hand(seen, RATES[rate]())
    assert progress(optimizer)["parameters"] == progress(manual)["parameters"]
    assert progress(optimizer)["state"] == progress(manual)["state"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_tensor_stays_the_tensor_that_was_given(name: str) -> None:
    """A compiled step reads it, so a scheduler must write into it. Where torch replaces it, it does so for all."""
    sgd = torch.optim.SGD(parameters([(4, 3)]), lr=torch.tensor(0.01), momentum=0.9)
    assert keeps_its_tensor(DolphinFlow(parameters([(4, 3)]), lr=torch.tensor(0.01)), name) == keeps_its_tensor(
        sgd, name
    )
    assert name == "CosineAnnealingWarmRestarts" or keeps_its_tensor(sgd, name)


def keeps_its_tensor(optimizer: torch.optim.Optimizer, name: str) -> bool:
    scheduler = SCHEDULERS[name](optimizer)
    given = optimizer.param_groups[0]["lr"]
    run(optimizer, 1)
    scheduler.step(*[1.0] if name == "ReduceLROnPlateau" else [])
    return isinstance(given, torch.Tensor) and optimizer.param_groups[0]["lr"] is given


def test_the_loss_schedule_multiplies_what_a_scheduler_sets() -> None:
    optimizer = DolphinFlow(parameters([(4, 3)]), lr=0.01, loss_aware_schedule=True)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(5):
        optimizer.step(lambda: 1.0)
        scheduler.step()
    group = optimizer.param_groups[0]
    assert (group["lr"], group["loss_lr_scale"]) == (0.01 * 0.5**5, 0.99)
    alike = DolphinFlow([torch.nn.Parameter(p.detach().clone()) for p in all_parameters(optimizer)])
    alike.load_state_dict(optimizer.state_dict())
    alike.param_groups[0].update(lr=group["lr"] * 0.99, loss_lr_scale=1.0, loss_aware_schedule=False)
    group["loss_aware_schedule"] = False
    run(optimizer, 1)
    run(alike, 1)
    assert progress(optimizer)["parameters"] == progress(alike)["parameters"]


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)])
def test_a_rate_of_zero_moves_nothing_but_the_state(rate: Any) -> None:
    optimizer = DolphinFlow(parameters([(4, 3)]), lr=rate)
    before = [bits(p) for p in all_parameters(optimizer)]
    run(optimizer, 2)
    assert [bits(p) for p in all_parameters(optimizer)] == before
    assert optimizer.state[all_parameters(optimizer)[0]]["momentum_buffer"].any()
