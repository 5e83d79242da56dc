"""What THORN takes beside parameters, gradients and state: a stated scratch, and under gradient release no gradients.

What is not orthogonalized stays within the workspace. A matrix cannot be cut: it takes a fixed number of tensors of its
size and two Gram matrices, whichever form the polynomial is evaluated in.
"""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trysquare import THORN
from trysquare_conformance.behaviour import Shapes, all_parameters
from trysquare_conformance.memory import peak_bytes

FLOAT32 = 4
SMALL = 1 << 10
"""Bytes of what does not grow with anything: norms, counts, corrections."""

PACKED = 10 << 10
"""Bytes that bfloat16 products of a small matrix pack for themselves with two threads (measured: 9.4 KiB)."""

SHAPES: dict[str, Shapes] = {
    "vector": [(80_000,)],
    "matrix": [(5_000, 20)],
    "many alike": [(32, 32)] * 100,
    "many vectors": [(250,)] * 200,
}
RULES: dict[str, dict[str, Any]] = {
    "averaged": {},
    "averaged only": {"betas": (0.0, 0.99)},
    "adam": {"schedule_free": False},
    "skip": {"nonfinite": "skip"},
}


def prepared(shapes: Shapes, dtype: torch.dtype, orthogonalize: bool, **settings: Any) -> THORN:
    """An optimizer after one step, with the gradients of the next."""
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    optimizer = THORN([{"params": params, "orthogonalize": orthogonalize}], none_grad=False, **settings)
    for i, p in enumerate(all_parameters(optimizer)):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(dtype)
    optimizer.step()
    return optimizer


MATRICES = list(
    product(
        [(120, 60), (80, 80), (16, 8, 3, 3), (300, 500)],
        [torch.float32, torch.bfloat16],
        [torch.float32, torch.bfloat16],
        ["propagate", "skip"],
    )
)
"""Shape, dtype of the products and of the parameter, and `nonfinite`."""


@pytest.mark.parametrize(("dtype", "workspace"), [(torch.float32, 1 << 18), (torch.bfloat16, 1 << 15)], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SHAPES)
def test_what_is_not_orthogonalized_stays_within_its_workspace(
    name: str, rule: str, dtype: torch.dtype, workspace: int
) -> None:
    optimizer = prepared(SHAPES[name], dtype, orthogonalize=False, workspace_bytes=workspace, **RULES[rule])
    rates = 200 * 8 * len(SHAPES[name])  # float64 numbers of every member, and lists of them
    assert peak_bytes(optimizer.step) <= workspace + SMALL + rates


@pytest.mark.parametrize(("shape", "products", "dtype", "policy"), MATRICES, ids=str)
def test_a_matrix_takes_six_tensors_and_two_gram_matrices(
    shape: tuple[int, ...], products: torch.dtype, dtype: torch.dtype, policy: str
) -> None:
    """A half parameter one more, in float32; a step that may be taken back two more."""
    settings = {"workspace_bytes": SMALL, "matmul_dtype": products, "nonfinite": policy}
    optimizer = prepared([shape], dtype, orthogonalize=True, **settings)
    size = torch.Size(shape).numel()
    side = min(shape[0], size // shape[0])
    tensors = 6 + (dtype != torch.float32) + 2 * (policy == "skip")
    packed = PACKED if products == torch.bfloat16 and torch.get_num_threads() > 1 else 0
    assert peak_bytes(optimizer.step) <= FLOAT32 * (tensors * size + 2 * side**2) + SMALL + packed


def test_small_matrices_are_batched_within_the_workspace() -> None:
    """But for their Gram matrices, which are no larger than they are."""
    workspace = 1 << 20
    optimizer = prepared([(32, 32)] * 100, torch.float32, orthogonalize=True, workspace_bytes=workspace)
    assert peak_bytes(optimizer.step) <= 1.5 * workspace


# Gradient release

WIDTH, DEPTH = 256, 8
LAYER = FLOAT32 * WIDTH * WIDTH


def tower() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)])


def backward(model: nn.Module) -> None:
    model(torch.ones(1, WIDTH)).sum().backward()


def gradients_alive(model: nn.Module, optimizer: THORN | None, update_rate: int = 1) -> list[int]:
    """Bytes of all gradients that there are at once, each time one has been computed."""
    seen: list[int] = []

    def look(_: Tensor) -> None:
        seen.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(look)
    if optimizer is not None:
        optimizer.setup_gradient_release(model, update_rate, ignore_existing_hooks=True)
    for _ in range(2 * update_rate):
        backward(model)
    return seen


@pytest.mark.parametrize("update_rate", [1, 4])
def test_no_more_than_one_layers_gradients_are_alive(update_rate: int) -> None:
    model = tower()
    assert max(gradients_alive(tower(), None)) == DEPTH * LAYER
    assert max(gradients_alive(model, THORN(model), update_rate)) == LAYER


@pytest.mark.parametrize("exclude", [(), ("*",)], ids=["orthogonalized", "averaged"])
def test_a_backward_pass_takes_no_more_than_one_layer_and_its_step(exclude: tuple[str, ...]) -> None:
    """By torch's own account of memory, with activations of next to nothing."""
    alone, model = tower()[:1], tower()
    single = THORN(alone, exclude=exclude, matmul_dtype=torch.float32)
    for _ in range(2):
        backward(alone)
        scratch = peak_bytes(single.step)
    optimizer = THORN(model, exclude=exclude, matmul_dtype=torch.float32)
    plain = peak_bytes(lambda: backward(model))
    for p in model.parameters():
        p.grad = None
    optimizer.setup_gradient_release(model)
    backward(model)
    activations = FLOAT32 * WIDTH * DEPTH * 8
    assert plain >= DEPTH * LAYER
    assert peak_bytes(lambda: backward(model)) <= LAYER + scratch + activations
