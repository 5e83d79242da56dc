"""What cannot be optimized is refused when it is handed in: not tensors, or tensors that no step could move.

The hyperparameters are in `test_bad_input`, gradients and closures in `test_bad_steps`.
"""

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trysquare import DolphinFlow
from trysquare_conformance.behaviour import all_parameters, bits, held, normal, nothing_changes, parameters, run

GOOD = parameters([(4, 3)])[0]


@pytest.fixture
def optimizer() -> DolphinFlow:
    """After two steps: a matrix called weight, and a group of a vector, a convolution, a number and nothing."""
    weight, *rest = parameters()
    named = [("weight", weight)], [(f"other.{i}", p) for i, p in enumerate(rest)]
    made = DolphinFlow([{"params": group} for group in named])
    run(made, 2)
    return made


def still_works(optimizer: DolphinFlow, **arguments: Any) -> None:
    full = [p for p in all_parameters(optimizer) if p.numel()]
    before = [bits(p) for p in full]
    for p in full:
        p.grad = normal(tuple(p.shape), 7, dtype=p.dtype)
    optimizer.step(**arguments)
    assert all(old != bits(p) for old, p in zip(before, full, strict=True))


# What is handed in as parameters


def expanded() -> Tensor:
    return torch.nn.Parameter(torch.zeros(3).expand(4, 3))


def inferred() -> Tensor:
    with torch.inference_mode():
        return torch.zeros(4, 3)


TENSORS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "complex64": (lambda: torch.zeros(2, dtype=torch.complex64), "dtype torch.complex64: supported are torch.float32"),
    "complex128": (lambda: torch.zeros(2, dtype=torch.complex128), "dtype torch.complex128: supported are"),
    "int64": (lambda: torch.zeros(2, dtype=torch.int64), "dtype torch.int64: supported are"),
    "int8": (lambda: torch.zeros(2, dtype=torch.int8), "dtype torch.int8: supported are"),
    "bool": (lambda: torch.zeros(2, dtype=torch.bool), "dtype torch.bool: supported are"),
    "float8": (lambda: torch.zeros(2, dtype=torch.float8_e4m3fn), "dtype torch.float8_e4m3fn: supported are"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo: only dense"),
    "meta": (lambda: torch.zeros(2, device="meta"), "on the meta device and has no values: materialize the model"),
    "not a leaf": (lambda: GOOD * 2, "not a leaf: detach it"),
    "a view": (lambda: GOOD[0], "not a leaf: detach it"),
    "expanded": (expanded, "expanded, its entries share memory and cannot be written: clone it"),
    "inference": (inferred, "made in torch.inference_mode() and cannot be written: clone it"),
}

MODEL = torch.nn.Linear(2, 2)

PARAMS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "empty list": (list, ValueError, "empty parameter list"),
    "empty tuple": (tuple, ValueError, "empty parameter list"),
    "spent generator": (lambda: iter(()), ValueError, "empty parameter list"),
    "empty group": (lambda: [{"params": []}], ValueError, "got no parameters: every group is empty"),
    "two empty groups": (lambda: [{"params": []}, {"params": ()}], ValueError, "every group is empty"),
    "None": (lambda: None, TypeError, "params is a NoneType: give a list"),
    "number": (lambda: 5, TypeError, "params is a int: give a list"),
    "string": (lambda: "weight", TypeError, "params is a str: give a list"),
    "tensor": (lambda: GOOD, TypeError, "params is a Parameter: give a list"),
    "one group alone": (
        lambda: {"params": [GOOD]},
        TypeError,
        "params is a dict: give a list of tensors, or of groups",
    ),
    "method not called": (lambda: MODEL.parameters, TypeError, "params is a method: give a list"),
    "set": (lambda: {GOOD}, TypeError, "params is a set, whose order differs between runs: give a list"),
    "frozenset": (lambda: frozenset({GOOD}), TypeError, "params is a set, whose order differs"),
    "group of a set": (lambda: [{"params": {GOOD}}], TypeError, "params is a set, whose order differs"),
    "group of a number": (lambda: [{"params": 5}], TypeError, "params is a int: give a list"),
    "group without params": (lambda: [{"lr": 0.1}], ValueError, "no key 'params': give it the parameters"),
    "group and tensor mixed": (lambda: [{"params": [GOOD]}, GOOD], TypeError, "param_group must be a dict, but is"),
    "numbers": (lambda: [0.1, 0.2], TypeError, "parameter 0 of group 0 is a float: an optimizer takes tensors"),
    "None inside": (lambda: [GOOD, None], TypeError, "parameter 1 of group 0 is a NoneType"),
    "array": (lambda: [np.zeros(3)], TypeError, "parameter 0 of group 0 is a ndarray"),
    "nested list": (lambda: [[GOOD]], TypeError, "parameter 0 of group 0 is a list"),
    "triple": (lambda: [("a", GOOD, 1)], TypeError, "a tuple of 3: give a tensor or a pair (name, tensor)"),
    "swapped pair": (lambda: [(GOOD, "a")], TypeError, "a tuple of 2: give a tensor or a pair (name, tensor)"),
    "some named": (lambda: [("a", GOOD), *parameters([(2,)])], ValueError, "with/without names"),
    "twice": (lambda: [GOOD, *parameters([(2,)]), GOOD], ValueError, "parameter 2 of group 0 appears more than once"),
    "twice by name": (lambda: [("a", GOOD), ("b", GOOD)], ValueError, "b appears more than once"),
    "in two groups": (
        lambda: [{"params": [GOOD]}, {"params": [GOOD]}],
        ValueError,
        "parameter 0 of group 1 appears more than once",
    ),
}


@pytest.mark.parametrize("case", PARAMS)
def test_bad_params_are_refused(case: str) -> None:
    make, kind, says = PARAMS[case]
    before = held([GOOD])
    with pytest.raises(kind) as error:
        DolphinFlow(make())
    assert says in str(error.value)
    assert held([GOOD]) == before
    assert len(DolphinFlow([GOOD]).state) == 0


@pytest.mark.parametrize("case", TENSORS)
@pytest.mark.parametrize("named", [False, True])
def test_a_bad_tensor_is_refused_at_construction(case: str, named: bool) -> None:
    make, says = TENSORS[case]
    tensor = make()
    before = held([GOOD]), bits(tensor)
    with pytest.raises(ValueError, match="layer.bad" if named else "parameter 1 of group 0") as error:
        DolphinFlow([("layer.good", GOOD), ("layer.bad", tensor)] if named else [GOOD, tensor])
    assert says in str(error.value)
    assert (held([GOOD]), bits(tensor)) == before


@pytest.mark.parametrize("case", TENSORS)
def test_a_bad_tensor_is_refused_in_a_new_group(optimizer: DolphinFlow, case: str) -> None:
    make, says = TENSORS[case]
    tensor, good = make(), parameters([(2, 2)])[0]
    with nothing_changes(optimizer), pytest.raises(ValueError, match=r"layer.bad") as error:
        optimizer.add_param_group({"params": [("layer.good", good), ("layer.bad", tensor)]})
    assert says in str(error.value)
    optimizer.add_param_group({"params": [("layer.good", good)]})
    still_works(optimizer)


def test_a_parameter_of_another_group_is_refused(optimizer: DolphinFlow) -> None:
    weight = optimizer.param_groups[0]["params"][0]
    with nothing_changes(optimizer), pytest.raises(ValueError, match="again appears more than once"):
        optimizer.add_param_group({"params": [("again", weight)]})
    still_works(optimizer)


@pytest.mark.parametrize("group", [5, None, [GOOD], "params", GOOD])
def test_a_group_is_a_dict(optimizer: DolphinFlow, group: Any) -> None:
    with nothing_changes(optimizer), pytest.raises(TypeError, match="param_group must be a dict, but is"):
        optimizer.add_param_group(group)
    still_works(optimizer)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without distributed")
def test_a_sharded_parameter_is_refused() -> None:
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        try:
            sharded = DTensor.from_local(torch.zeros(4, 3), init_device_mesh("cpu", (1,)), [Shard(0)])
            with pytest.raises(ValueError, match="parameter 0 of group 0 is a DTensor: sharded parameters"):
                DolphinFlow([torch.nn.Parameter(sharded)])
        finally:
            torch.distributed.destroy_process_group()


def test_a_bad_group_does_not_eat_the_callers_dict(optimizer: DolphinFlow) -> None:
    group = {"params": (p for p in [GOOD * 2]), "lr": 0.5}
    with pytest.raises(ValueError, match="not a leaf"):
        optimizer.add_param_group(group)
    assert set(group) == {"params", "lr"}


@pytest.fixture(autouse=True)
def _good_stays_good() -> Iterator[None]:
    before = held([GOOD])
    yield
    assert held([GOOD]) == before
