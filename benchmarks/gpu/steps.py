"""Steps of 1 billion parameters: with float32 state beside AdamW's, with 8-bit state beside those of others."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import contenders, gpt2
from benchmarks.contenders import FOREACH, FUSED, Build, Contender, relative_error
from benchmarks.gpu import peers, shapes
from benchmarks.gpu.works import Accuracy, Entry, Subject, Work
from trysquare import DolphinFlow, DolphinFlow8bit
from trysquare_conformance import originals

OURS, EAGER = "DolphinFlow", "DolphinFlow, eager"
OURS_8BIT = "DolphinFlow8bit"
BITSANDBYTES, TORCHAO = "bitsandbytes AdamW8bit", "torchao AdamW8bit"
CHECKED_STEPS = 3
ERROR = "distance to the float64 result after three small steps, over the way that was gone"


def given(sizes: tuple[shapes.Shape, ...], device: torch.device) -> Callable[[], list[torch.nn.Parameter]]:
    """Makes parameters; all have the same gradients, into which no optimizer writes."""
    grads = functools.cache(lambda: gpt2.gradients(sizes, 0, device))

    def parameters() -> list[torch.nn.Parameter]:
        made = gpt2.weights(sizes, device=device)
        gpt2.give(made, grads())
        return made

    return parameters


def stepping(build: Build) -> Callable[[list[torch.nn.Parameter]], Subject]:
    def make(parameters: list[torch.nn.Parameter]) -> Subject:
        optimizer = build(parameters)
        return Subject(optimizer.step, optimizer)

    return make


def checked(build: Build, exact: Contender, device: torch.device, *, judged: bool) -> Accuracy:
    """After a few steps, beside what they are in float64; `judged`: by the conformance budget too."""
    parameters = gpt2.weights(shapes.CHECKED, device=device)
    start = [p.detach().clone() for p in parameters]
    batches = [gpt2.gradients(shapes.CHECKED, seed, device) for seed in range(CHECKED_STEPS)]
    optimizer = build(parameters)
    for batch in batches:
        gpt2.give(parameters, batch)
        optimizer.step()
    error = relative_error(parameters, exact.exact(start, batches), start)
    return Accuracy(error, exact.margin(start, batches, parameters) if judged else None)


def entry(contender: Contender, device: torch.device, parameters: int) -> Entry:
    """One whose float64 self is known."""
    moved = contender.bytes_per_parameter
    return Entry(
        contender.name,
        stepping(contender.build),
        functools.partial(checked, contender.build, contender, device, judged=True),
        bytes_moved=None if moved is None else moved * parameters,
        ours=contender.name in {OURS, EAGER},
    )


def dolphinflow(sizes: tuple[shapes.Shape, ...], device: torch.device, backend: str) -> Work:
    """DolphinFlow and those who step float32 parameters with float32 state."""
    one = functools.partial(entry, device=device, parameters=shapes.count(sizes))
    return Work(
        "dolphinflow",
        f"{shapes.count(sizes):,} float32 parameters of GPT shape",
        ERROR,
        given(sizes, device),
        (
            one(contenders.adamw(FUSED, fused=True)),
            one(contenders.adamw(FOREACH, foreach=True)),
            one(contenders.ours(OURS, 32, backend)),
            one(contenders.ours(EAGER, 32, "eager")),
        ),
    )


def eightbit(sizes: tuple[shapes.Shape, ...], device: torch.device, backend: str) -> Work:
    """Those who keep 8-bit state, and DolphinFlow, whose state a share is taken of."""
    adamw, whole = contenders.adamw(FOREACH, foreach=True), contenders.ours(OURS, 32, backend)
    uncoded = Contender(OURS_8BIT, lambda p: DolphinFlow8bit(p, lr=1e-4, backend="eager"), None)  # as it is in float64
    rows: tuple[tuple[str, Build, Contender, str | None], ...] = (
        (OURS, lambda p: DolphinFlow(p, lr=1e-4, backend=backend), whole, None),
        (OURS_8BIT, lambda p: DolphinFlow8bit(p, lr=1e-4, backend=backend), uncoded, None),
        (BITSANDBYTES, bitsandbytes, adamw, peers.without_bitsandbytes()),
        (TORCHAO, torchao, adamw, peers.TORCHAO.missing()),
    )
    entries = (
        Entry(
            name,
            stepping(build),
            functools.partial(checked, build, exact, device, judged=name == OURS),
            missing=missing,
            ours=exact is not adamw,
        )
        for name, build, exact, missing in rows
    )
    title = f"{shapes.count(sizes):,} float32 parameters of GPT shape, 8-bit state"
    return Work("eightbit", title, f"{ERROR} without codes", given(sizes, device), tuple(entries))


def bitsandbytes(parameters: list[torch.nn.Parameter]) -> Any:
    return originals.bitsandbytes().optim.AdamW8bit(parameters, lr=1e-4, weight_decay=1e-2)


def torchao(parameters: list[torch.nn.Parameter]) -> Any:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr=1e-4, weight_decay=1e-2)
