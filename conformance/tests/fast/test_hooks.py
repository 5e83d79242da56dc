"""Hooks of torch.optim are called in their places and may change what passes through them."""

from collections.abc import Callable
from typing import Any

import torch

from trysquare import DolphinFlow
from trysquare_conformance.behaviour import clones, parameters, run


def test_every_hook_is_called_in_its_place() -> None:
    optimizer, calls = DolphinFlow(parameters()), []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    optimizer.register_step_pre_hook(note("before step"))
    optimizer.register_step_post_hook(note("after step"))
    optimizer.register_state_dict_pre_hook(note("before saving"))
    optimizer.register_state_dict_post_hook(note("after saving"))
    optimizer.register_load_state_dict_pre_hook(note("before loading"))
    optimizer.register_load_state_dict_post_hook(note("after loading"))
    optimizer.step(lambda: calls.append("step"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == [
        "before step",
        "step",
        "after step",
        "before saving",
        "after saving",
        "before loading",
        "after loading",
    ]


def test_hooks_may_change_what_is_saved_and_loaded() -> None:
    optimizer = DolphinFlow(parameters(), lr=0.5)
    run(optimizer, 1)
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "epoch": 7})
    again = DolphinFlow(clones(optimizer))

    def slower(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": group["lr"] / 2} for group in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    again.register_load_state_dict_pre_hook(slower)
    saved = optimizer.state_dict()
    again.load_state_dict(saved)
    assert saved["epoch"] == 7
    assert (again.param_groups[0]["lr"], saved["param_groups"][0]["lr"]) == (0.25, 0.5)


def test_a_step_hook_may_change_the_arguments() -> None:
    optimizer = DolphinFlow(parameters(), loss_aware_schedule=True)
    optimizer.register_step_pre_hook(lambda *_: ((optimizer, lambda: 4.0), {}))
    optimizer.step()
    assert optimizer.param_groups[0]["loss_ema"] == 4.0
