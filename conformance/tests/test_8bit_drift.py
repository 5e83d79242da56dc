"""How far 8-bit state strays from 32-bit state in a thousand steps, and from its own 8-bit reference: told, not judged.

What is asserted is only that it learns as well: the loss that both end at, on a task with noise in its gradients.
"""

from collections.abc import Callable
from typing import Any

import torch

from trysquare import DolphinFlow8bit, _coded_state
from trysquare_conformance.behaviour import normal

STEPS = 1000
INPUTS, OUTPUTS, BATCH = 64, 80, 32
Record = Callable[[str, object], None]


def trained(monkeypatch: Any, *, coded: bool) -> tuple[torch.Tensor, float]:
    """A linear layer after a thousand noisy batches of a regression; without codes it is AdamW with projection."""
    if not coded:
        monkeypatch.setattr(_coded_state, "is_coded", lambda _: False)
    target = normal((INPUTS, OUTPUTS), 0) / 8
    weight = torch.nn.Parameter(0.1 * normal((INPUTS, OUTPUTS), 1))
    optimizer = DolphinFlow8bit([weight], lr=1e-3, ortho_mode=None, weight_decay=0.0)
    for step in range(STEPS):
        x = normal((BATCH, INPUTS), 2, step)
        optimizer.zero_grad()
        noise = normal((BATCH, OUTPUTS), 3, step)
        (x @ (weight - target) + noise).square().mean().backward()
        optimizer.step()
    monkeypatch.undo()
    assert ("qmap1" in optimizer.state[weight]) == coded
    return weight.detach(), float((weight - target).detach().square().mean())


def test_the_drift_from_32_bit_state_is_told(monkeypatch: Any, record_property: Record) -> None:
    start, target = 0.1 * normal((INPUTS, OUTPUTS), 1), normal((INPUTS, OUTPUTS), 0) / 8
    whole, whole_loss = trained(monkeypatch, coded=False)
    coded, coded_loss = trained(monkeypatch, coded=True)
    drift = float((coded - whole).norm() / (whole - start).norm())
    begun = float((start - target).square().mean())
    figures = {"drift": drift, "error in 32 bits": whole_loss, "error in 8 bits": coded_loss, "error at first": begun}
    for name, value in figures.items():
        record_property(name, value)
    print(f"after {STEPS} steps: {figures}")
    assert 0 < drift < 0.25
    assert coded_loss < 1.25 * whole_loss < begun / 4
