"""Steps on tensors of a device that has no memory, run as a program: which operations touch the CPU, as JSON.

There is nothing to read there, so that every result that Python asks for is an error, as it would be during a capture.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trysquare import THORN, DolphinFlow, DolphinFlow8bit
from trysquare._capture import Numbers

SHAPES = {
    torch.float32: ((4, 3), (4, 3), (3,), (), (0, 3), (64, 100), (2, 3, 8, 256)),
    torch.bfloat16: ((3,), (64, 100)),
}
POLICIES = ("propagate", "skip")

Make = Callable[[torch.device, str], Any]


class Watched(TorchDispatchMode):
    """Counts operations, and notes those that take or make a tensor elsewhere than on a device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.count, self.elsewhere = device, 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operation."""
        result = func(*args, **(kwargs or {}))
        self.count += 1
        if any(isinstance(x, Tensor) and x.device != self.device for x in tree_leaves((args, kwargs, result))):
            self.elsewhere.add(str(func))
        return result


def parameters(device: torch.device, least: int = 0) -> list[torch.nn.Parameter]:
    """Of many shapes and two dtypes, and one that is not contiguous."""
    made = [
        torch.nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        for dtype, shapes in SHAPES.items()
        for shape in shapes
        if len(shape) >= least
    ]
    return [*made, torch.nn.Parameter(torch.ones(64, 80, device=device).mT)]


def dolphinflow(mode: str | None, **settings: Any) -> Make:
    return lambda device, nonfinite: DolphinFlow(
        parameters(device), ortho_mode=mode, nonfinite=nonfinite, backend="eager", **settings
    )


def eight_bit(mode: str | None, **settings: Any) -> Make:
    return lambda device, nonfinite: DolphinFlow8bit(
        parameters(device), ortho_mode=mode, nonfinite=nonfinite, backend="eager", **settings
    )


def thorn(**settings: Any) -> Make:
    return lambda device, nonfinite: THORN(
        [{"params": parameters(device, 2 if settings["orthogonalize"] else 0), **settings}],
        nonfinite=nonfinite,
        backend="eager",
        matmul_dtype=torch.bfloat16,
    )


STEPS: dict[str, Make] = {
    "DolphinFlow, vector": dolphinflow("vector"),
    "DolphinFlow, vector, update": dolphinflow("vector", project="update", bias_correction=False),
    "DolphinFlow, matrix": dolphinflow("matrix"),
    "DolphinFlow, plain": dolphinflow(None, adaptive_lr=False, gradient_clipping=None),
    "DolphinFlow, little workspace": dolphinflow("vector", workspace_bytes=1 << 17),
    "DolphinFlow8bit, vector": eight_bit("vector"),
    "DolphinFlow8bit, matrix": eight_bit("matrix"),
    "DolphinFlow8bit, plain": eight_bit(None, adaptive_lr=False, gradient_clipping=None),
    "DolphinFlow8bit, little workspace": eight_bit("vector", workspace_bytes=1 << 17),
    "THORN, matrices": thorn(orthogonalize=True, rectify=True),
    "THORN, plain matrices": thorn(orthogonalize=True, betas=(0.9, 0.0), target_rms=0.0),
    "THORN, averaged": thorn(orthogonalize=False, rectify=True),
    "THORN, averaged only": thorn(orthogonalize=False, betas=(0.0, 0.99)),
    "THORN, adam": thorn(orthogonalize=False, schedule_free=False),
}


def elsewhere(make: Make, nonfinite: str, device: torch.device, rate: float | Tensor | None = None) -> list[str]:
    """What touches the CPU in a step as a graph takes it, the second; ``rate`` stands in for a number on the device."""
    optimizer, numbers, found = make(device, nonfinite), Numbers(), set[str]()
    for step in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        with Watched(device) as seen, torch.no_grad():
            numbers.load(optimizer.param_groups, device)
            with numbers.in_place(optimizer.param_groups):
                if rate is not None:
                    optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
        if seen.count < sum(map(len, SHAPES.values())):
            raise RuntimeError(f"only {seen.count} operations were seen")
        found = seen.elsewhere
    return sorted(found)


def reads(device: torch.device) -> str:
    """What a step that reads a result comes to; the name of the error."""
    try:
        elsewhere(dolphinflow("vector"), "raise", device)
    except Exception as error:  # noqa: BLE001 (its name is the answer)
        return type(error).__name__
    return "nothing"


def main() -> None:
    """Every optimizer, and two that must be seen."""
    backend_registration._setup_privateuseone_for_python_backend("elsewhere")
    device = torch.device("elsewhere", 0)
    with FakeTensorMode():
        found: dict[str, Any] = {
            f"{name}, {nonfinite}": elsewhere(make, nonfinite, device)
            for name, make in STEPS.items()
            for nonfinite in POLICIES
        }
        found["a rate on the host"] = elsewhere(dolphinflow("vector"), "skip", device, torch.tensor(0.1))
        found["a step that reads"] = reads(device)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
