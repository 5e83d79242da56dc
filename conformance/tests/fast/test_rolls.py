"""What a step finds out about its parameters is kept for the next one, and found out anew as soon as it has changed."""

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trysquare import THORN, DolphinFlow, DolphinFlow8bit
from trysquare._optimizer import BatchedOptimizer
from trysquare_conformance.behaviour import all_parameters, bits, give_gradients, normal, parameters, run

SHAPES = [(4, 3), (4, 3), (3, 4), (5,), (64, 80)]


def dolphinflow() -> BatchedOptimizer:
    return DolphinFlow(parameters(SHAPES), lr=0.01)


def eight_bit() -> BatchedOptimizer:
    return DolphinFlow8bit(parameters(SHAPES), lr=0.01)


def thorn() -> BatchedOptimizer:
    matrices, others = parameters(SHAPES), parameters(SHAPES)
    groups = [
        {"params": [p for p in matrices if p.ndim > 1], "orthogonalize": True},
        {"params": others, "orthogonalize": False},
    ]
    return THORN(groups, none_grad=False)


MAKERS = [dolphinflow, eight_bit, thorn]


def first(optimizer: BatchedOptimizer) -> Tensor:
    return all_parameters(optimizer)[0]


def without_gradient(optimizer: BatchedOptimizer) -> None:
    first(optimizer).grad = None


def gradient_of_another_layout(optimizer: BatchedOptimizer) -> None:
    first(optimizer).grad = normal((3, 4), 7).mT


def parameter_of_another_layout(optimizer: BatchedOptimizer) -> None:
    p = first(optimizer)
    p.data = p.data.mT.contiguous().mT


def parameter_of_another_dtype(optimizer: BatchedOptimizer) -> None:
    p = first(optimizer)
    p.grad = None
    p.data = p.data.bfloat16()
    p.grad = normal(tuple(p.shape), 8).bfloat16()


def parameter_of_another_shape(optimizer: BatchedOptimizer) -> None:
    p = first(optimizer)
    optimizer.state.pop(p)
    p.grad = None
    p.data = p.data.flatten()[:8].view(2, 4)
    p.grad = normal((2, 4), 8)


def parameter_elsewhere(optimizer: BatchedOptimizer) -> None:
    p = first(optimizer)
    p.data = 2 * p.data


def without_state(optimizer: BatchedOptimizer) -> None:
    optimizer.state.pop(first(optimizer))


def another_state_tensor(optimizer: BatchedOptimizer) -> None:
    state = optimizer.state[first(optimizer)]
    state["step"] = state["step"] + 5


def state_elsewhere(optimizer: BatchedOptimizer) -> None:
    for tensor in optimizer.state[first(optimizer)].values():
        tensor.data = tensor.data.clone()


def state_of_another_dtype(optimizer: BatchedOptimizer) -> None:
    for name, tensor in optimizer.state[first(optimizer)].items():
        if name != "step" and tensor.is_floating_point():
            tensor.data = tensor.data.double()


def one_more_group(optimizer: BatchedOptimizer) -> None:
    (added,) = parameters([(4, 3)], seed=9)
    optimizer.add_param_group({"params": [added], **({"orthogonalize": True} if isinstance(optimizer, THORN) else {})})


def one_more_parameter(optimizer: BatchedOptimizer) -> None:
    optimizer.param_groups[0]["params"].insert(0, *parameters([(4, 3)], seed=9))


def one_parameter_less(optimizer: BatchedOptimizer) -> None:
    del optimizer.param_groups[0]["params"][0]


def another_order(optimizer: BatchedOptimizer) -> None:
    optimizer.param_groups[0]["params"].reverse()


def other_settings(optimizer: BatchedOptimizer) -> None:
    for group in optimizer.param_groups:
        if isinstance(optimizer, THORN):
            group["betas"] = (0.9, 0.9) if group["orthogonalize"] else group["betas"]
            group["rectify"] = True
        else:
            group["ortho_mode"] = "matrix"


def own_checkpoint(optimizer: BatchedOptimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


EDITS = [
    without_gradient,
    gradient_of_another_layout,
    parameter_of_another_layout,
    parameter_of_another_dtype,
    parameter_of_another_shape,
    parameter_elsewhere,
    without_state,
    another_state_tensor,
    state_elsewhere,
    state_of_another_dtype,
    one_more_group,
    one_more_parameter,
    one_parameter_less,
    another_order,
    other_settings,
    own_checkpoint,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_after_an_edit_a_step_is_that_of_an_optimizer_that_has_kept_nothing(
    make: Callable[[], BatchedOptimizer], edit: Callable[[BatchedOptimizer], None]
) -> None:
    optimizer = make()
    run(optimizer, 2)
    forgetful = copy.deepcopy(optimizer)
    assert optimizer._rolls
    assert not forgetful._rolls
    for one in (optimizer, forgetful):
        give_gradients(all_parameters(one), seed=3)
        edit(one)
        for _ in range(2):
            one.step()
    assert values(optimizer) == values(forgetful)


def values(optimizer: BatchedOptimizer) -> list[object]:
    return [
        (bits(p), {name: (bits(t), t.dtype) for name, t in optimizer.state.get(p, {}).items()})
        for p in all_parameters(optimizer)
    ]


def sparse_gradient(optimizer: BatchedOptimizer) -> None:
    p = first(optimizer)
    p.grad = p.detach().to_sparse()


def state_of_another_shape(optimizer: BatchedOptimizer) -> None:
    tensor = optimizer.state[first(optimizer)]["step"]
    tensor.data = torch.zeros(2, dtype=tensor.dtype)


def no_tensor_in_the_state(optimizer: BatchedOptimizer) -> None:
    optimizer.state[first(optimizer)]["step"] = 7


def gradient_of_another_shape(optimizer: BatchedOptimizer) -> None:
    p = first(optimizer)
    p.data = p.data.mT.contiguous()


@pytest.mark.parametrize(
    "edit", [sparse_gradient, state_of_another_shape, no_tensor_in_the_state, gradient_of_another_shape]
)
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_what_was_right_in_the_last_step_is_refused_when_it_no_longer_is(
    make: Callable[[], BatchedOptimizer], edit: Callable[[BatchedOptimizer], None]
) -> None:
    optimizer = make()
    run(optimizer, 2)
    give_gradients(all_parameters(optimizer), seed=3)
    edit(optimizer)
    before = [bits(p) for p in all_parameters(optimizer)]
    with pytest.raises(ValueError, match=r"gradient|state"):
        optimizer.step()
    assert [bits(p) for p in all_parameters(optimizer)] == before


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_no_gradient_is_kept_alive(make: Callable[[], BatchedOptimizer]) -> None:
    optimizer = make()
    run(optimizer, 2)
    gradients = [weakref.ref(p.grad) for p in all_parameters(optimizer)]
    optimizer.zero_grad()
    assert [gradient() for gradient in gradients] == [None] * len(gradients)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_what_was_kept_of_a_group_goes_with_it(make: Callable[[], BatchedOptimizer]) -> None:
    optimizer = make()
    one_more_group(optimizer)
    run(optimizer, 1)
    optimizer.param_groups.pop()
    run(optimizer, 1)
    assert len(optimizer._rolls) == len(optimizer.param_groups)
