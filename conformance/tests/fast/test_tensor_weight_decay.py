"""A weight decay may be a 0-dim tensor, as a learning rate may, and the step is the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trysquare import THORN, DolphinFlow, DolphinFlow8bit
from trysquare_conformance.behaviour import all_parameters, bits, normal, parameters, progress, run, written
from trysquare_conformance.behaviour_thorn import KINDS, groups
from trysquare_conformance.lanes import LANES

MISSING = LANES["compiled-cpu"].available()
Make = Callable[..., Any]
SHAPES = ((4, 3), (4, 3), (3,), (80, 60))
OPTIMIZERS: dict[str, Make] = {
    "DolphinFlow": lambda **settings: DolphinFlow(parameters(SHAPES), **settings),
    "DolphinFlow in matrix mode": lambda **settings: DolphinFlow(parameters(SHAPES), ortho_mode="matrix", **settings),
    "DolphinFlow in bfloat16": lambda **settings: DolphinFlow(parameters(SHAPES, torch.bfloat16), **settings),
    "DolphinFlow8bit": lambda **settings: DolphinFlow8bit(parameters(SHAPES), **settings),
    **{
        f"THORN, {kind}": lambda kind=kind, **settings: THORN(groups((kind,)), **settings)  # type: ignore[misc]
        for kind in KINDS
    },
}
COMPILED: dict[str, Make] = {
    "DolphinFlow": lambda **settings: DolphinFlow(parameters(SHAPES[:1]), **settings),
    "DolphinFlow8bit": lambda **settings: DolphinFlow8bit(parameters(SHAPES[-1:]), **settings),
    "THORN, averaged": OPTIMIZERS["THORN, averaged"],
    "THORN, matrices": lambda **settings: OPTIMIZERS["THORN, matrices"](iters=2, **settings),
}
"""One of each kind of update, and of each one compilation, is enough."""

DECAY = 2.0**-3
"""A power of two: a product with it is exact, so that it is the same whether it is rounded before a sum or not."""


def numbers(optimizer: Any) -> dict[str, Any]:
    """All but the groups, which hold the hyperparameters themselves."""
    return {name: part for name, part in progress(optimizer).items() if name != "groups"}


def assert_decays_alike(make: Make, backend: str, dtype: torch.dtype) -> None:
    """Over three steps, the last with another decay."""
    plain = make(lr=2.0**-6, weight_decay=DECAY, backend=backend)
    scheduled = make(lr=2.0**-6, weight_decay=torch.tensor(DECAY, dtype=dtype), backend=backend)
    for step, decay in enumerate((DECAY, DECAY, DECAY / 2)):
        for group, other in zip(plain.param_groups, scheduled.param_groups, strict=True):
            group["weight_decay"] = decay
            other["weight_decay"].fill_(decay)
        run(plain, 1, first=step)
        run(scheduled, 1, first=step)
    assert numbers(scheduled) == numbers(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_tensor_decays_as_its_value_does(name: str, dtype: torch.dtype) -> None:
    assert_decays_alike(OPTIMIZERS[name], "eager", dtype)


@pytest.mark.skipif(MISSING is not None, reason=f"nothing can be compiled here: {MISSING}")
@pytest.mark.parametrize("name", COMPILED)
def test_a_tensor_decays_in_a_compiled_update_as_its_value_does(name: str) -> None:
    """Of the dtype that is not the arithmetic's."""
    assert_decays_alike(COMPILED[name], "compiled", torch.float64)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_both_numbers_of_a_step_may_be_tensors(name: str) -> None:
    both = OPTIMIZERS[name](lr=torch.tensor(2.0**-6), weight_decay=torch.tensor(DECAY))
    rate = OPTIMIZERS[name](lr=torch.tensor(2.0**-6), weight_decay=DECAY)
    run(both, 3)
    run(rate, 3)
    assert numbers(both) == numbers(rate)


@pytest.mark.parametrize("name", ["DolphinFlow", "DolphinFlow8bit", "THORN, averaged"])
def test_a_checkpoint_keeps_the_tensor(name: str) -> None:
    first, second = (OPTIMIZERS[name](weight_decay=torch.tensor(0.1)) for _ in range(2))
    run(first, 2)
    with torch.no_grad():
        for mine, theirs in zip(all_parameters(second), all_parameters(first), strict=True):
            mine.copy_(theirs)
    second.load_state_dict(written(first.state_dict()))
    assert isinstance(second.param_groups[0]["weight_decay"], torch.Tensor)
    run(first, 2, first=2)
    run(second, 2, first=2)
    assert progress(second) == progress(first)


def test_what_goes_to_bitsandbytes_is_a_number() -> None:
    optimizer = DolphinFlow8bit([torch.nn.Parameter(normal((64, 64), 0))], weight_decay=torch.tensor(0.25))
    run(optimizer, 1)
    (group,) = optimizer.bitsandbytes_state_dict()["param_groups"]
    assert bits(group["weight_decay"]) == "0.25"


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_the_value_of_a_tensor_is_read_where_it_is_given_and_loaded(value: float) -> None:
    with pytest.raises(ValueError, match=r"weight_decay=tensor.* must be a finite float or 0-dim float tensor, >= 0"):
        DolphinFlow(parameters(), weight_decay=torch.tensor(value))
    optimizer = DolphinFlow(parameters(), weight_decay=torch.tensor(0.5))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["weight_decay"] = torch.tensor(value)
    with pytest.raises(ValueError, match="state_dict: group 0: weight_decay=tensor"):
        optimizer.load_state_dict(saved)
