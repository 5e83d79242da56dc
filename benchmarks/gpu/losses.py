"""Cross-entropies over a large vocabulary, there and back."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.cpu import SOFTMAX, STABLEMAX, there_and_back
from benchmarks.gpu.works import Accuracy, Entry, Subject, Work
from trysquare import stablemax_cross_entropy

COMPILED = f"{SOFTMAX}, compiled"
CHECKED = (64, 1000)
ROTATED = 2
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def losses(size: tuple[int, int], device: torch.device, backend: str) -> Work:
    """bfloat16 logits, as a model under autocast makes them."""
    ours = _stablemax(backend)
    rows: tuple[tuple[str, Loss, Loss], ...] = (
        (SOFTMAX, F.cross_entropy, F.cross_entropy),
        (COMPILED, torch.compile(_cross_entropy, dynamic=False), F.cross_entropy),
        (STABLEMAX, ours, stablemax_cross_entropy),
    )
    entries = (
        Entry(
            name,
            functools.partial(_there_and_back, loss),
            functools.partial(_error, loss, exact, device),
            ours=loss is ours,
        )
        for name, loss, exact in rows
    )
    title = f"cross-entropy of {size[0]:,} × {size[1]:,} bfloat16 logits, and its gradient"
    inputs = functools.cache(lambda: _inputs(size, device, ROTATED))
    return Work("losses", title, "relative distance to the float64 gradient", inputs, tuple(entries))


def _cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A function of Python's own: torch 2.6 compiles no other."""
    return F.cross_entropy(logits, target)


def _stablemax(backend: str) -> Loss:
    """With the backend where it can be asked for one: then an interpreter can be."""
    if "backend" not in inspect.signature(stablemax_cross_entropy).parameters:
        return stablemax_cross_entropy
    return functools.partial(stablemax_cross_entropy, backend=backend)


def _inputs(size: tuple[int, int], device: torch.device, count: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device}
    logits = [torch.randn(size, dtype=torch.bfloat16, **options).requires_grad_() for _ in range(count)]
    return logits, torch.randint(size[1], size[:1], **options)


def _there_and_back(loss: Loss, inputs: tuple[list[torch.Tensor], torch.Tensor]) -> Subject:
    return Subject(there_and_back(loss, *inputs))


def _error(loss: Loss, exact: Loss, device: torch.device) -> Accuracy:
    """Of the gradient on small logits; the float64 one is made on the CPU."""
    (logits,), targets = _inputs(CHECKED, device, 1)
    wide = logits.detach().cpu().double().requires_grad_()
    loss(logits, targets).backward()
    exact(wide, targets.cpu()).backward()
    found, right = logits.grad, wide.grad
    assert found is not None
    assert right is not None
    return Accuracy(float(torch.linalg.norm(found.cpu().double() - right) / torch.linalg.norm(right)))
