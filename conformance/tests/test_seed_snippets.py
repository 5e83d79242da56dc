"""Every snippet of DolphinFlow's own documentation runs as written, and does what the text around it promises.

The dots that it leaves to the reader are filled in.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import trysquare
from trysquare import _backend
from trysquare_conformance.budget import STORED, Budget, Wrap, judge, measure
from trysquare_conformance.case import Array, Outputs
from trysquare_conformance.noise import FLOAT32
from trysquare_conformance.snapshots import to_array
from trysquare_reference import dolphinflow as reference

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
README_SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

BASIC_USAGE = """
import torch
from dolphinflow import DolphinFlow
# Example model
model = torch.nn.Linear(100, 10)
# Use it like any other PyTorch optimizer
optimizer = DolphinFlow(model.parameters(), lr=1e-4)
"""

COMPILED_STEP = """
import torch
from dolphinflow import DolphinFlow
# Your optimizer and model
optimizer = DolphinFlow(model.parameters(), lr=1e-2)
# Your training logic
def train_step(data, targets):
    optimizer.zero_grad()
    # model forward, loss, backward...
    torch.nn.functional.cross_entropy(model(data), targets).backward()
    optimizer.step()
# Compile the function for a massive speedup
compiled_train_step = torch.compile(train_step)
# Run the compiled function in your loop
for data, targets in dataloader:
    compiled_train_step(data, targets)
"""
EAGER_STEP = COMPILED_STEP.replace("torch.compile(train_step)", "train_step")


BASIC_USAGE_8BIT = """
import torch
from dolphinflow import DolphinFlow8bit
model = torch.nn.Linear(100, 10)
# The 8-bit version is a drop-in replacement
optimizer = DolphinFlow8bit(model.parameters(), lr=1e-4)
"""


def run(snippet: str, **given: Any) -> dict[str, Any]:
    """The snippet's names after it ran in a module of its own."""
    names = {"__name__": "__main__", **given}
    exec(compile(snippet, "<snippet>", "exec"), names)  # noqa: S102 - the text of this repository
    return names


def moved(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> list[bool]:
    """Which parameters a step on this loss changed."""
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]


@pytest.mark.parametrize("snippet", README_SNIPPETS, ids=[f"README-{i}" for i in range(len(README_SNIPPETS))])
def test_every_snippet_of_the_readme_runs(snippet: str) -> None:
    names = run(snippet)
    assert isinstance(names["optimizer"], trysquare.DolphinFlow | trysquare.DolphinFlow8bit | trysquare.THORN)


def test_basic_usage_gives_an_optimizer_that_trains() -> None:
    names = run(BASIC_USAGE)
    model, optimizer = names["model"], names["optimizer"]
    assert type(optimizer) is trysquare.DolphinFlow
    assert all(moved(model, optimizer, model(torch.randn(8, 100)).square().mean()))


def test_basic_usage_of_the_8bit_version_gives_an_optimizer_that_trains() -> None:
    names = run(BASIC_USAGE_8BIT)
    model, optimizer = names["model"], names["optimizer"]
    assert type(optimizer) is trysquare.DolphinFlow8bit
    assert all(moved(model, optimizer, model(torch.randn(8, 100)).square().mean()))


def test_the_8bit_version_is_a_drop_in_replacement() -> None:
    """Every snippet of the other version runs with the name replaced, and every argument of its feature list."""
    swapped = [text.replace("DolphinFlow", "DolphinFlow8bit") for text in (BASIC_USAGE, EAGER_STEP)]
    basic = run(swapped[0])
    loader = [(torch.randn(16, 100), torch.randint(10, (16,))) for _ in range(2)]
    stepped = run(swapped[1], model=basic["model"], dataloader=loader)
    assert type(stepped["optimizer"]) is trysquare.DolphinFlow8bit
    listed = {"ortho_mode": "vector", "loss_aware_schedule": False, "weight_decay": 1e-2, "adaptive_lr": True}
    optimizer = trysquare.DolphinFlow8bit(basic["model"].parameters(), lr=1e-4, gradient_clipping=1.0, **listed)
    assert {name: optimizer.defaults[name] for name in listed} == listed


@pytest.mark.parametrize("ortho_mode", ["vector", "matrix", None])
def test_the_8bit_version_works_for_all_layer_types(ortho_mode: str | None) -> None:
    model = Images()
    optimizer = trysquare.DolphinFlow8bit(model.parameters(), lr=1e-3, ortho_mode=ortho_mode)
    assert all(moved(model, optimizer, model(torch.arange(16)).square().mean()))


def test_the_8bit_version_takes_three_quarters_less_memory() -> None:
    """The table says "~75% less"; the state of a layer that is large enough to be coded."""
    sizes = []
    for kind in (trysquare.DolphinFlow, trysquare.DolphinFlow8bit):
        model = torch.nn.Linear(512, 512, bias=False)
        optimizer = kind(model.parameters())
        assert all(moved(model, optimizer, model(torch.randn(8, 512)).square().mean()))
        state = optimizer.state[model.weight]
        sizes.append(sum(x.numel() * x.element_size() for x in state.values()))
    assert 0.74 < 1 - sizes[1] / sizes[0] < 0.75


@pytest.mark.usefixtures("forget_compilations")
def test_the_train_step_compiles_with_the_8bit_version() -> None:
    """And ends near to where the same steps end in eager mode, whose roundings, and so some codes, are others."""
    loader = [(torch.randn(16, 64), torch.randint(64, (16,))) for _ in range(3)]
    steps, compiled_steps = (text.replace("DolphinFlow", "DolphinFlow8bit") for text in (EAGER_STEP, COMPILED_STEP))
    before, eager, compiled = (perceptron([np.full((64, 64), 0.1), np.eye(64)]) for _ in range(3))
    lr = run(steps, model=eager, dataloader=loader)["optimizer"].param_groups[0]["lr"]
    outside = sum(_backend.calls.values())
    run(compiled_steps, model=compiled, dataloader=loader)
    assert sum(_backend.calls.values()) == outside, "some of the optimizer's work was not captured"
    for old, expected, p in zip(before.parameters(), eager.parameters(), compiled.parameters(), strict=True):
        assert not torch.equal(p, old)
        assert (p - expected).abs().max() < 0.1 * lr


class Images(torch.nn.Module):
    """A layer of each usual type."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(16, 6 * 6)
        self.convolution = torch.nn.Conv2d(1, 3, 3)
        self.norm = torch.nn.GroupNorm(1, 3)
        self.head = torch.nn.Linear(3 * 4 * 4, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        images = self.embedding(tokens).view(-1, 1, 6, 6)
        hidden: torch.Tensor = self.head(self.norm(self.convolution(images)).flatten(1))
        return hidden


@pytest.mark.parametrize("ortho_mode", ["vector", "matrix", None])
def test_every_mode_works_for_all_layer_types(ortho_mode: str | None) -> None:
    model = Images()
    optimizer = trysquare.DolphinFlow(model.parameters(), lr=1e-3, ortho_mode=ortho_mode)
    assert all(moved(model, optimizer, model(torch.arange(16)).square().mean()))


@pytest.fixture
def forget_compilations() -> Iterator[None]:
    """What is compiled here is counted from zero, and does not use up the limit of whoever compiles next."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def perceptron(weights: list[Array]) -> torch.nn.Module:
    layers = [torch.nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights]
    for layer, w in zip(layers, weights, strict=True):
        layer.weight.data.copy_(torch.from_numpy(w))
    return torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1])


def perceptron_gradients(weights: list[Array], data: Array, one_hot: Array) -> list[Array]:
    """Of the mean cross-entropy of a perceptron with one hidden layer, by the chain rule in NumPy."""
    first, second = weights
    hidden = np.maximum(data @ first.T, 0.0)
    odds = np.exp(hidden @ second.T)
    delta = (odds / np.sum(odds, axis=1, keepdims=True) - one_hot) * (1 / len(data))
    return [((delta @ second) * np.sign(hidden)).T @ data, delta.T @ hidden]


def train_step_budgets(weights: list[Array], batches: list[tuple[Array, Array]]) -> dict[str, Budget]:
    """What honest float32 may make of the whole train step over these batches: forward, backward and optimizer."""
    hp = reference.Hyperparameters(lr=1e-2)

    def train(wrap: Wrap) -> Outputs:
        now, states = [wrap(w) for w in weights], [reference.init(wrap(w), hp) for w in weights]
        for data, one_hot in batches:
            now, states = reference.step(now, perceptron_gradients(now, wrap(data), wrap(one_hot)), states, hp)
        return {f"weight/{i}": w for i, w in enumerate(now)}

    return measure(train, FLOAT32, {f"weight/{i}": STORED["float32"] for i in range(len(weights))}, seed=0)


@pytest.mark.usefixtures("forget_compilations")
def test_the_compiled_train_step_equals_eager_within_budget() -> None:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape).astype(np.float32).astype(np.float64) / 4 for shape in ((20, 12), (5, 20))]
    batches = [(rng.integers(-8, 9, (16, 12)) / 4.0, np.eye(5)[rng.integers(0, 5, 16)]) for _ in range(4)]
    loader = [(torch.tensor(x, dtype=torch.float32), torch.tensor(y.argmax(1))) for x, y in batches]
    eager, compiled = perceptron(weights), perceptron(weights)
    run(EAGER_STEP, model=eager, dataloader=loader)
    outside = sum(_backend.calls.values())
    run(COMPILED_STEP, model=compiled, dataloader=loader)
    assert sum(_backend.calls.values()) == outside, "some of the optimizer's work was not captured"
    assert counters["stats"]["unique_graphs"] > 0
    budgets = train_step_budgets(weights, batches)
    for model in (eager, compiled):
        margins = [judge(budgets[f"weight/{i}"], to_array(p)).worst for i, p in enumerate(model.parameters())]
        assert max(margins) <= 1


@pytest.mark.usefixtures("forget_compilations")
def test_the_compiled_train_step_is_compiled_once() -> None:
    loader = [(torch.randn(16, 12), torch.randint(5, (16,))) for _ in range(6)]
    names = run(COMPILED_STEP, model=perceptron([np.ones((20, 12)), np.ones((5, 20))]), dataloader=loader)
    graphs = counters["stats"]["unique_graphs"]
    for data, targets in loader:
        names["compiled_train_step"](data, targets)
    assert counters["stats"]["unique_graphs"] == graphs


def test_under_bf16_autocast_parameters_gradients_and_state_stay_float32() -> None:
    model = torch.nn.Linear(100, 10)
    optimizer = trysquare.DolphinFlow(model.parameters(), lr=1e-4)
    for _ in range(3):
        with torch.autocast(device_type="cpu", dtype=torch.bfloat16):
            output = model(torch.randn(32, 100))
            loss = torch.nn.functional.cross_entropy(output, torch.randint(10, (32,)))
        assert output.dtype is torch.bfloat16
        assert all(moved(model, optimizer, loss))
    for p in model.parameters():
        state = optimizer.state[p]
        held = [p, p.grad, state["momentum_buffer"], state["exp_avg_sq"]]
        assert {tensor.dtype for tensor in held if tensor is not None} == {torch.float32}
        assert bool(torch.isfinite(p).all())


def test_with_stablemax_confident_examples_still_give_a_gradient() -> None:
    """Softmax collapse: the logits are so far apart that the softmax of the right class rounds to one."""
    model = torch.nn.Linear(8, 4, bias=False)
    torch.nn.init.eye_(model.weight)
    optimizer = trysquare.DolphinFlow(model.parameters(), lr=1e-4, ortho_mode="vector")
    inputs, targets = 1e4 * torch.eye(8)[:4], torch.arange(4)
    torch.nn.functional.cross_entropy(model(inputs), targets).backward()
    assert model.weight.grad is not None
    assert not model.weight.grad.any()
    loss = trysquare.stablemax_cross_entropy(model(inputs), targets)
    assert all(moved(model, optimizer, loss))
    assert model.weight.grad.any()


def test_the_loss_aware_schedule_lowers_the_rate_when_the_loss_stalls() -> None:
    model = torch.nn.Linear(100, 10)
    optimizer = trysquare.DolphinFlow(model.parameters(), lr=1e-3, loss_aware_schedule=True)
    inputs, targets = torch.randn(32, 100), torch.randint(10, (32,))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        return torch.tensor(1.0)  # a loss that never falls

    scales = []
    for _ in range(10):
        optimizer.step(closure)
        scales.append(optimizer.param_groups[0]["loss_lr_scale"])
    assert scales == [1.0] * 4 + [0.99] * 5 + [0.99 * 0.99]
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_the_loss_aware_schedule_needs_a_closure() -> None:
    optimizer = trysquare.DolphinFlow(torch.nn.Linear(2, 2).parameters(), loss_aware_schedule=True)
    with pytest.raises(ValueError, match="loss_aware_schedule"):
        optimizer.step()
