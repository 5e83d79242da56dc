"""A state dict that is corrupt, or that of something else, is refused whole: nothing of it is loaded."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trysquare import DolphinFlow
from trysquare_conformance.behaviour import all_parameters, bits, nothing_changes, parameters, run

StateDict = dict[str, Any]
Damage = Callable[[StateDict], Any]
NAN, INF = float("nan"), float("inf")


def two_groups(seed: int = 0) -> DolphinFlow:
    """After two steps: a matrix; a vector, a convolution, a number and nothing, not yet stepped."""
    first, *rest, last = parameters(seed=seed)
    optimizer = DolphinFlow([{"params": [first]}, {"params": rest}])
    run(optimizer, 2)
    optimizer.param_groups[1]["params"].append(last)
    return optimizer


def group(index: int, **changes: Any) -> Damage:
    def damage(saved: StateDict) -> None:
        saved["param_groups"][index].update(changes)

    return damage


def without(index: int, key: str) -> Damage:
    def damage(saved: StateDict) -> None:
        del saved["param_groups"][index][key]

    return damage


def state(key: int, **changes: Any) -> Damage:
    def damage(saved: StateDict) -> None:
        saved["state"][key].update(changes)

    return damage


def lacking(key: int, name: str) -> Damage:
    def damage(saved: StateDict) -> None:
        del saved["state"][key][name]

    return damage


def replaced(**changes: Any) -> Damage:
    return lambda saved: {**saved, **changes}


def moved_state(saved: StateDict) -> None:
    saved["state"][77] = saved["state"].pop(0)


def swapped_states(saved: StateDict) -> None:
    entries = saved["state"]
    entries[0], entries[1] = entries[1], entries[0]


def one_group(saved: StateDict) -> None:
    del saved["param_groups"][1]


def regrouped(saved: StateDict) -> None:
    first, second = (g["params"] for g in saved["param_groups"])
    first.append(second.pop())


def another_group(saved: StateDict) -> None:
    saved["param_groups"].append({**saved["param_groups"][0], "params": []})


STEP = torch.tensor(2.0, dtype=torch.float64)
DAMAGES: dict[str, tuple[Damage, type[Exception], str]] = {
    # the whole
    "None": (lambda _: [None], TypeError, "state_dict is a list: give what an optimizer's state_dict() returned"),
    "text": (lambda _: "checkpoint.pt", TypeError, "state_dict is a str: give what an optimizer's state_dict()"),
    "no state": (lambda s: {"param_groups": s["param_groups"]}, ValueError, "no key 'state'"),
    "no groups": (lambda s: {"state": s["state"]}, ValueError, "no key 'param_groups'"),
    "a model's": (lambda _: torch.nn.Linear(2, 2).state_dict(), ValueError, "it is no optimizer's state_dict()"),
    "state None": (replaced(state=None), TypeError, "'state' and 'param_groups' are NoneType and list"),
    "state a list": (replaced(state=[]), TypeError, "they must be a dict and a list"),
    "groups None": (replaced(param_groups=None), TypeError, "they must be a dict and a list"),
    "groups a dict": (replaced(param_groups={}), TypeError, "they must be a dict and a list"),
    # groups
    "a group is None": (replaced(param_groups=[None, None]), TypeError, "group 0 has no list 'params'"),
    "params missing": (without(1, "params"), TypeError, "group 1 has no list 'params'"),
    "params a number": (group(1, params=3), TypeError, "group 1 has no list 'params'"),
    "params unhashable": (group(1, params=[[1], [2], [3], [4]]), TypeError, "group 1 has no list 'params'"),
    "params repeated": (group(1, params=[0, 2, 3, 4]), ValueError, "parameter 0 is listed more than once"),
    "fewer groups": (one_group, ValueError, "groups of [1] parameters, but this optimizer has groups of [1, 4]"),
    "more groups": (another_group, ValueError, "groups of [1, 4, 0] parameters, but this optimizer has groups of"),
    "other sizes": (regrouped, ValueError, "groups of [2, 3] parameters, but this optimizer has groups of [1, 4]"),
    "hyperparameter missing": (without(1, "beta2"), ValueError, "group 1: no 'beta2'; is it the state_dict of another"),
    "schedule missing": (without(0, "loss_ema"), ValueError, "group 0: no 'loss_ema'"),
    "unknown key": (group(0, betas=(0.9, 0.99)), ValueError, "group 0: unknown key 'betas'"),
    "own clipping": (group(1, gradient_clipping=7.0), ValueError, "gradient_clipping=7.0 differs"),
    "loss_ema": (group(0, loss_ema=NAN), ValueError, "group 0: loss_ema=nan must be a finite float or None"),
    "loss_ema text": (group(0, loss_ema="low"), ValueError, "loss_ema='low' must be a finite float or None"),
    "stall_count": (group(1, stall_count=-1), ValueError, "group 1: stall_count=-1 must be an int >= 0"),
    "stall_count float": (group(1, stall_count=1.5), ValueError, "stall_count=1.5 must be an int >= 0"),
    "loss_lr_scale": (group(0, loss_lr_scale=INF), ValueError, "loss_lr_scale=inf must be a finite float, >= 0"),
    "negative scale": (group(0, loss_lr_scale=-1.0), ValueError, "loss_lr_scale=-1.0 must be a finite float, >= 0"),
    "names": (group(1, param_names=["a"]), ValueError, "param_names=['a'] does not name 4 parameters"),
    "names a number": (group(1, param_names=4), ValueError, "param_names=4 does not name 4 parameters"),
    # states
    "state of nobody": (moved_state, ValueError, "state for 77, which no group lists"),
    "states swapped": (swapped_states, ValueError, "has shape (3,) and dtype torch.float32; expected (4, 3) and"),
    "a state is None": (lambda s: s["state"].update({0: None}), ValueError, "has NoneType; expected step, momentum"),
    "state empty": (lambda s: s["state"].update({0: {}}), ValueError, "expected step, momentum_buffer, exp_avg_sq"),
    "entry missing": (lacking(1, "exp_avg_sq"), ValueError, "has step, momentum_buffer; expected step, momentum"),
    "step missing": (lacking(1, "step"), ValueError, "expected step, momentum_buffer, exp_avg_sq"),
    "entry extra": (state(0, exp_avg=torch.zeros(4, 3)), ValueError, "exp_avg; expected step, momentum_buffer"),
    "entry a number": (state(0, momentum_buffer=0.0), TypeError, "momentum_buffer is a float; expected a tensor"),
    "entry None": (state(0, exp_avg_sq=None), TypeError, "exp_avg_sq is a NoneType; expected a tensor"),
    "shape": (state(0, momentum_buffer=torch.zeros(3, 4)), ValueError, "momentum_buffer has shape (3, 4)"),
    "broadcastable": (state(0, exp_avg_sq=torch.zeros(1, 3)), ValueError, "exp_avg_sq has shape (1, 3)"),
    "bfloat16": (state(0, exp_avg_sq=torch.zeros(4, 3).bfloat16()), ValueError, "expected (4, 3) and torch.float32"),
    "float64": (state(0, exp_avg_sq=torch.zeros(4, 3).double()), ValueError, "expected (4, 3) and torch.float32"),
    "complex": (state(0, exp_avg_sq=torch.zeros(4, 3).cfloat()), ValueError, "dtype torch.complex64"),
    "sparse": (state(0, exp_avg_sq=torch.eye(4, 3).to_sparse()), ValueError, "exp_avg_sq is torch.sparse_coo on cpu"),
    "meta": (state(0, exp_avg_sq=torch.zeros(4, 3, device="meta")), ValueError, "torch.strided on meta; expected"),
    "step a number": (state(0, step=2), TypeError, "step is a int; expected a tensor"),
    "step float32": (state(0, step=STEP.float()), ValueError, "expected () and torch.float64"),
    "step a vector": (state(0, step=STEP.view(1)), ValueError, "step has shape (1,)"),
    "step negative": (state(0, step=-STEP), ValueError, "step=-2.0 must be finite and >= 0"),
    "step NaN": (state(0, step=STEP * NAN), ValueError, "step=nan must be finite and >= 0"),
    "step infinite": (state(1, step=STEP * INF), ValueError, "step=inf must be finite and >= 0"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_corrupt_state_dict_is_refused_whole(name: str) -> None:
    damage, kind, says = DAMAGES[name]
    optimizer, saved = two_groups(), copy.deepcopy(two_groups(seed=1).state_dict())
    damaged = damage(saved) or saved
    with nothing_changes(optimizer), pytest.raises(kind) as error:
        optimizer.load_state_dict(damaged)
    assert says in str(error.value)
    works(optimizer)


def works(optimizer: DolphinFlow) -> None:
    """It still steps, and still loads what is right."""
    full = [p for p in all_parameters(optimizer) if p.numel()]
    before = [bits(p) for p in full]
    optimizer.load_state_dict(two_groups(seed=1).state_dict())
    run(optimizer, 1)
    assert all(old != bits(p) for old, p in zip(before, full, strict=True))


OTHERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda params: torch.optim.RMSprop(params, momentum=0.9),
    "DolphinFlow without second moment": lambda params: DolphinFlow(params, adaptive_lr=False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_optimizers_state_dict_is_refused_whole(name: str) -> None:
    first, *rest = parameters(seed=1)
    other = OTHERS[name]([{"params": [first]}, {"params": rest}])
    run(other, 2)
    optimizer = two_groups()
    saved = other.state_dict()
    if name.startswith("DolphinFlow"):
        for changed in saved["param_groups"]:
            changed["adaptive_lr"] = True
    with nothing_changes(optimizer), pytest.raises(ValueError, match="state_dict"):
        optimizer.load_state_dict(saved)
    works(optimizer)


def test_a_model_of_other_shapes_is_refused() -> None:
    first, *rest = parameters([(4, 3), (3,), (2, 3, 2, 2), (1,), (0, 3)])
    other = DolphinFlow([{"params": [first]}, {"params": rest}])
    run(other, 1)
    optimizer = two_groups()
    with nothing_changes(optimizer), pytest.raises(ValueError, match=r"has shape \(1,\) .* expected \(\)"):
        optimizer.load_state_dict(other.state_dict())
    works(optimizer)


def test_an_error_names_the_parameter() -> None:
    optimizer = DolphinFlow([("layer.weight", p) for p in parameters([(2, 2)])])
    run(optimizer, 1)
    saved = optimizer.state_dict()
    saved["state"][0] = {**saved["state"][0], "momentum_buffer": torch.zeros(2)}
    with nothing_changes(optimizer), pytest.raises(ValueError, match=r"state of layer\.weight: momentum_buffer"):
        optimizer.load_state_dict(saved)


def test_what_a_pre_hook_breaks_is_refused() -> None:
    optimizer = two_groups()
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: {"param_groups": saved["param_groups"]})
    with nothing_changes(optimizer), pytest.raises(ValueError, match="no key 'state'"):
        optimizer.load_state_dict(two_groups().state_dict())


def test_a_refused_state_dict_is_not_changed() -> None:
    saved = two_groups().state_dict()
    saved["state"][0] = {**saved["state"][0], "step": torch.tensor(-1.0, dtype=torch.float64)}
    before = repr(saved)
    with pytest.raises(ValueError, match="step=-1"):
        two_groups().load_state_dict(saved)
    assert repr(saved) == before
