"""What DolphinFlow8bit cannot honour is refused with the reason and a way out, and nothing has changed."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trysquare import DolphinFlow, DolphinFlow8bit
from trysquare._constraints import Choice, Flag, Integer, Number
from trysquare_conformance.behaviour import all_parameters, held, nothing_changes, parameters, run, written

NAN, INF = math.nan, math.inf
SHAPES = ((64, 80), (3,), (4100,))
StateDict = dict[str, Any]
INSTEAD = "load_bitsandbytes_state_dict"


def stepped(**settings: Any) -> DolphinFlow8bit:
    optimizer = DolphinFlow8bit(parameters(SHAPES), **settings)
    run(optimizer, 2)
    return optimizer


def bad_values(constraint: Any) -> list[Any]:
    """Some that a hyperparameter must not have, by its kind."""
    if isinstance(constraint, Number):
        values = [NAN, INF, -INF, -0.5, True, "0.1", [0.1], 0.1j, torch.tensor([0.1])]
        values += [] if constraint.high == INF else [constraint.high]
        values += [constraint.low] if constraint.low_open else []
        return values + ([] if constraint.none else [None])
    if isinstance(constraint, Integer):
        return [constraint.low - 1, True, 1.5, None, str(constraint.low)]
    if isinstance(constraint, Flag):
        return [0, 1, None, "True"]
    assert isinstance(constraint, Choice)
    return ["nonsense", 0, True]


BAD = [(name, value) for name, c in DolphinFlow8bit._constraints.items() for value in bad_values(c)]
BAD_EXECUTION = [("nonfinite", "ignore"), ("nonfinite", None), ("backend", "cuda"), ("backend", None), ("backend", 1)]
BAD_EXECUTION += [("workspace_bytes", value) for value in (0, -1, True, 1.5, "1")]


@pytest.mark.parametrize(("name", "value"), [*BAD, *BAD_EXECUTION], ids=lambda x: str(x).replace(" ", ""))
def test_a_bad_argument_is_refused(name: str, value: Any) -> None:
    params = parameters(SHAPES)
    before = held(params)
    with pytest.raises(ValueError, match=name) as error:
        DolphinFlow8bit(params, **{name: value})
    assert f"{name}={value!r}" in str(error.value)
    assert held(params) == before


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda x: str(x).replace(" ", ""))
def test_a_bad_edit_is_refused_by_the_next_step(name: str, value: Any) -> None:
    optimizer = stepped()
    optimizer.param_groups[0][name] = value
    with nothing_changes(optimizer), pytest.raises(ValueError, match=f"group 0: {name}="):
        optimizer.step()


@pytest.mark.parametrize("name", ["project", "bias_correction"])
def test_arguments_of_the_32_bit_version_alone_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        DolphinFlow8bit(parameters(SHAPES), **{name: True})


def test_triton_is_refused_and_not_replaced() -> None:
    with pytest.raises((ValueError, ImportError), match=r"backend='triton': DolphinFlow8bit needs .*'eager'"):
        DolphinFlow8bit(parameters(SHAPES), backend="triton")


def test_bitsandbytes_is_a_backend_of_the_8_bit_version_alone() -> None:
    with pytest.raises(ValueError, match="backend='bitsandbytes'"):
        DolphinFlow(parameters(SHAPES), backend="bitsandbytes")


# Without bitsandbytes

WITHOUT = """
import sys
sys.modules["bitsandbytes"] = None  # as if it were not installed
import torch
from trysquare import *
from dolphinflow import DolphinFlow8bit as alias
assert alias is DolphinFlow8bit
parameter = torch.nn.Parameter(torch.ones(64, 64))
parameter.grad = torch.ones(64, 64)
optimizer = DolphinFlow8bit([parameter])
optimizer.step()
optimizer.load_bitsandbytes_state_dict(optimizer.bitsandbytes_state_dict())
try:
    DolphinFlow8bit([parameter], backend="bitsandbytes")
except ImportError as error:
    print(error)
"""


def test_without_bitsandbytes_everything_but_its_backend_works() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], check=True, capture_output=True, text=True)
    assert "pip install 'trysquare[bnb]'" in done.stdout
    assert "'auto', 'eager' and 'compiled'" in done.stdout


# Foreign state


def damaged(change: Callable[[dict[str, Any]], None], key: int = 0) -> Callable[[StateDict], None]:
    return lambda saved: change(saved["state"][key])


def larger_blocks(state: dict[str, Any]) -> None:
    state["absmax1"] = torch.ones(3)


def other_map(state: dict[str, Any]) -> None:
    state["qmap1"] = torch.linspace(-1, 1, 256)


def maps_exchanged(state: dict[str, Any]) -> None:
    state["qmap1"], state["qmap2"] = state["qmap2"], state["qmap1"]


def float_state(state: dict[str, Any]) -> None:
    state["state1"] = state["state1"].float()


def negative_scale(state: dict[str, Any]) -> None:
    state["absmax2"][1] = -1.0


def nested(state: dict[str, Any]) -> None:
    moments = {name: state.pop(name) for name in list(state) if name != "step"}
    state["__bnb_optimizer_quant_state__"] = moments


def no_second_moment(state: dict[str, Any]) -> None:
    for name in ("state2", "qmap2", "absmax2"):
        del state[name]


def codes_of_another_shape(state: dict[str, Any]) -> None:
    state["state1"] = state["state1"].T


def float_codes_of_a_small_tensor(state: dict[str, Any]) -> None:
    state["state1"] = state["state1"].to(torch.uint8)


FOREIGN: dict[str, tuple[Callable[[StateDict], None], str]] = {
    "blocks of 2048": (damaged(larger_blocks), rf"absmax1 of parameter 0 has 3 scales.*blocks of 256.*{INSTEAD}"),
    "a linear map": (damaged(other_map), rf"qmap1 of parameter 0 is not the signed dynamic map.*{INSTEAD}"),
    "maps exchanged": (damaged(maps_exchanged), "qmap1 of parameter 0 is not the signed dynamic map"),
    "float state": (damaged(float_state), rf"state1 of parameter 0 is torch.float32 for 5120 elements.*{INSTEAD}"),
    "a negative scale": (damaged(negative_scale), "absmax2 of parameter 0 has negative scales"),
    "nested by bitsandbytes": (damaged(nested), rf"written by bitsandbytes\. {INSTEAD}"),
    "no second moment": (damaged(no_second_moment), "has step, state1, qmap1, absmax1; expected step, state1"),
    "transposed codes": (damaged(codes_of_another_shape), r"state1 has shape \(80, 64\)"),
    "codes of a small tensor": (damaged(float_codes_of_a_small_tensor, 1), "state1 has shape .* torch.uint8"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_state_is_refused_whole(what: str) -> None:
    change, message = FOREIGN[what]
    optimizer, other = stepped(), stepped(lr=0.5)
    saved = written(other.state_dict())
    change(saved)
    with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    run(optimizer, 1)


def test_the_state_of_the_32_bit_version_is_refused() -> None:
    optimizer, whole = stepped(), DolphinFlow(parameters(SHAPES))
    run(whole, 1)
    with nothing_changes(optimizer), pytest.raises(ValueError, match=r"unknown key 'bias_correction'|no 'project'"):
        optimizer.load_state_dict(whole.state_dict())


def test_our_own_state_dict_is_not_bitsandbytes() -> None:
    optimizer = stepped()
    with nothing_changes(optimizer), pytest.raises(ValueError, match=r"load_state_dict\(\) reads our own"):
        optimizer.load_bitsandbytes_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("given", [None, [], "file.pt", {}, {"state": {}}])
def test_what_is_no_state_dict_is_refused(given: Any) -> None:
    optimizer = stepped()
    with nothing_changes(optimizer), pytest.raises(ValueError, match="give what bitsandbytes"):
        optimizer.load_bitsandbytes_state_dict(given)


def exchanged(optimizer: DolphinFlow8bit) -> StateDict:
    return written(optimizer.bitsandbytes_state_dict())


def without_betas(saved: StateDict) -> None:
    del saved["param_groups"][0]["betas"]


def three_betas(saved: StateDict) -> None:
    saved["param_groups"][0]["betas"] = (0.9, 0.99, 0.999)


def strange_betas(saved: StateDict) -> None:
    saved["param_groups"][0]["betas"] = (0.9, 1.5)


def two_groups(saved: StateDict) -> None:
    saved["param_groups"].append({**saved["param_groups"][0], "params": []})


def without_step(saved: StateDict) -> None:
    del saved["state"][0]["step"]


def clipped_norms(saved: StateDict) -> None:
    saved["state"][0]["__bnb_optimizer_quant_state__"]["unorm_vec"] = torch.zeros(1)


def not_contiguous(saved: StateDict) -> None:
    moments = saved["state"][0]["__bnb_optimizer_quant_state__"]
    moments["state1"] = moments["state1"].mT.contiguous().mT


def blocks_of_2048(saved: StateDict) -> None:
    saved["state"][0]["__bnb_optimizer_quant_state__"]["absmax1"] = torch.ones(3)


INCOMPLETE: dict[str, tuple[Callable[[StateDict], None], str]] = {
    "no betas": (without_betas, "group 0 has no 'betas'"),
    "three betas": (three_betas, "must be two numbers"),
    "strange betas": (strange_betas, "beta2=1.5"),
    "two groups": (two_groups, "2 groups, but this optimizer has 1"),
    "no step": (without_step, "state of 0 has no step"),
    "percentile clipping": (clipped_norms, "unorm_vec"),
    "not contiguous": (not_contiguous, "state1 of 0 is not contiguous"),
    "blocks of 2048": (blocks_of_2048, "blocks of 256"),
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_a_damaged_state_of_bitsandbytes_is_refused_whole(what: str) -> None:
    change, message = INCOMPLETE[what]
    optimizer, other = stepped(), stepped(lr=0.5)
    saved = exchanged(other)
    change(saved)
    with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
        optimizer.load_bitsandbytes_state_dict(saved)


def test_what_adamw_has_no_place_for_is_not_exchanged() -> None:
    plain = stepped(adaptive_lr=False)
    saved = exchanged(stepped())
    with nothing_changes(plain), pytest.raises(ValueError, match="adaptive_lr=False"):
        plain.bitsandbytes_state_dict()
    with nothing_changes(plain), pytest.raises(ValueError, match="adaptive_lr=False"):
        plain.load_bitsandbytes_state_dict(saved)
    wide = DolphinFlow8bit(parameters(SHAPES, dtype=torch.float64))
    run(wide, 1)
    with pytest.raises(ValueError, match="float64"):
        wide.bitsandbytes_state_dict()


def test_loading_what_was_written_changes_nothing_but_the_number_type_of_the_betas() -> None:
    optimizer = stepped(lr=0.01, momentum=0.8)
    again = DolphinFlow8bit([torch.nn.Parameter(p.detach().clone()) for p in all_parameters(optimizer)])
    again.load_bitsandbytes_state_dict(exchanged(optimizer))
    assert again.param_groups[0]["momentum"] == 0.8
    run(optimizer, 2, first=2)
    run(again, 2, first=2)
    ours, theirs = (held(all_parameters(each)) for each in (optimizer, again))
    assert ours == theirs
