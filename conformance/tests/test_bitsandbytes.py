"""The real `bitsandbytes.optim.AdamW8bit` reads what we write and writes what we read, and goes on from there.

Its kernels are measured here too: the decoder on a CPU is exact, the encoder is not, which is why only the one is used.
"""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from trysquare import DolphinFlow8bit
from trysquare.ops import blockwise8bit as ops
from trysquare_conformance import originals
from trysquare_conformance.behaviour import all_parameters, bits, give_gradients, held, parameters, run, written

MISSING = originals.without_bitsandbytes()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

SHAPES = ((64, 80), (3,), (4100,), (16, 8, 6, 6))
NESTED = "__bnb_optimizer_quant_state__"
AS_ADAMW = {"ortho_mode": None, "gradient_clipping": None, "momentum": 0.9, "beta2": 0.999}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(scope="module")
def bnb() -> Any:
    return originals.bitsandbytes()


def theirs(bnb: Any, params: Sequence[torch.Tensor], **settings: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = bnb.optim.AdamW8bit(params, lr=0.01, betas=(0.9, 0.999), **settings)
    return optimizer


def ours(params: Sequence[torch.Tensor], **settings: Any) -> DolphinFlow8bit:
    return DolphinFlow8bit(params, lr=0.01, **{**AS_ADAMW, **settings})


def same_weights(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in all_parameters(optimizer)]


def apart(first: torch.optim.Optimizer, second: torch.optim.Optimizer, start: Sequence[torch.Tensor]) -> float:
    """The distance of two runs over the way that they went."""
    ends = [
        [x.detach() for x in ends] for ends in zip(all_parameters(first), all_parameters(second), start, strict=True)
    ]
    gap = sum(float((a - b).double().square().sum()) for a, b, _ in ends)
    way = sum(float((a - w).double().square().sum()) for a, _, w in ends)
    return (gap / way) ** 0.5


# Interchange


@DTYPES
def test_they_read_what_we_write_bit_for_bit(bnb: Any, dtype: torch.dtype) -> None:
    optimizer = ours(parameters(SHAPES, dtype=dtype), weight_decay=0.1, eps=1e-7)
    run(optimizer, 3)
    reader = theirs(bnb, same_weights(optimizer))
    reader.load_state_dict(written(optimizer.bitsandbytes_state_dict()))
    group = reader.param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["eps"], group["weight_decay"]) == (0.01, (0.9, 0.999), 1e-7, 0.1)
    for p, q in zip(all_parameters(optimizer), all_parameters(reader), strict=True):
        state, read = optimizer.state[p], reader.state[q]
        assert read["step"] == 3
        assert {name: bits(read[name]) for name in read if name != "step"} == {
            name: bits(state[name]) for name in state if name != "step"
        }


@DTYPES
def test_we_read_what_they_write_bit_for_bit(bnb: Any, dtype: torch.dtype) -> None:
    writer = theirs(bnb, parameters(SHAPES, dtype=dtype), weight_decay=0.1, eps=1e-7)
    run(writer, 3)
    saved = written(writer.state_dict())
    assert NESTED in saved["state"][0]
    optimizer = DolphinFlow8bit(same_weights(writer), lr=0.5)
    optimizer.load_bitsandbytes_state_dict(saved)
    group = optimizer.param_groups[0]
    named = ("lr", "momentum", "beta2", "eps", "weight_decay", "ortho_mode", "gradient_clipping")
    assert [group[name] for name in named] == [0.01, 0.9, 0.999, 1e-7, 0.1, "vector", 1.0]
    for key, p in enumerate(all_parameters(optimizer)):
        entries = saved["state"][key][NESTED]
        assert optimizer.state[p]["step"] == 3
        assert {name: bits(optimizer.state[p][name]) for name in entries} == {
            name: bits(entries[name]) for name in entries
        }


def test_we_read_what_older_versions_wrote(bnb: Any) -> None:
    """Before 0.49.2 nothing was nested."""
    writer = theirs(bnb, parameters(SHAPES))
    run(writer, 2)
    saved = written(writer.state_dict())
    saved["state"] = {key: {"step": s["step"], **s[NESTED]} for key, s in saved["state"].items()}
    optimizer = ours(same_weights(writer))
    optimizer.load_bitsandbytes_state_dict(saved)
    assert len(optimizer.state) == len(SHAPES)


def test_load_state_dict_refuses_theirs_and_names_the_function(bnb: Any) -> None:
    writer = theirs(bnb, parameters(SHAPES))
    run(writer, 2)
    optimizer = ours(same_weights(writer))
    with pytest.raises(ValueError, match=r"load_bitsandbytes_state_dict\(\) reads what"):
        optimizer.load_state_dict(writer.state_dict())
    assert not optimizer.state


def test_there_and_back_changes_no_bit(bnb: Any) -> None:
    optimizer = ours(parameters(SHAPES))
    run(optimizer, 3)
    reader = theirs(bnb, same_weights(optimizer))
    reader.load_state_dict(written(optimizer.bitsandbytes_state_dict()))
    again = ours(same_weights(optimizer))
    again.load_bitsandbytes_state_dict(written(reader.state_dict()))
    run(optimizer, 2, first=3)
    run(again, 2, first=3)
    assert held(all_parameters(again)) == held(all_parameters(optimizer))


@pytest.mark.parametrize("direction", ["to bitsandbytes", "from bitsandbytes"])
def test_a_run_goes_on_in_the_other(bnb: Any, direction: str, record_property: Any) -> None:
    """Twenty steps by one, twenty by the other, and forty by one alone: near to each other.

    Not equal: their encoder on a CPU is not exact.
    """
    first: torch.optim.Optimizer = ours(parameters(SHAPES))
    start = [p.detach().clone() for p in all_parameters(first)]
    if direction == "from bitsandbytes":
        first = theirs(bnb, all_parameters(first))
    run(first, 20)
    alone = copy.deepcopy(first) if direction == "to bitsandbytes" else None
    if alone is None:
        follower = ours(same_weights(first), weight_decay=0.01)
        follower.load_bitsandbytes_state_dict(written(first.state_dict()))
        alone = first
    else:
        follower = theirs(bnb, same_weights(first))
        follower.load_state_dict(written(first.bitsandbytes_state_dict()))
    run(follower, 20, first=20)
    run(alone, 20, first=20)
    distance = apart(alone, follower, start)
    record_property("distance", distance)
    print(f"{direction}: {distance:.3g} of the way apart")
    assert distance < 0.05


def test_without_projection_and_clipping_it_is_adamw8bit(bnb: Any, record_property: Any) -> None:
    """Both run free from the same start."""
    leader, follower = theirs(bnb, parameters(SHAPES)), ours(parameters(SHAPES))
    start = [p.detach().clone() for p in all_parameters(leader)]
    run(leader, 1)
    run(follower, 1)
    assert apart(leader, follower, start) < 1e-4
    run(leader, 49, first=1)
    run(follower, 49, first=1)
    distance = apart(leader, follower, start)
    record_property("distance", distance)
    print(f"{distance:.3g} of the way apart after 50 steps")
    assert distance < 0.05


# Their kernels


def blocks(seed: int, count: int = 64) -> torch.Tensor:
    """Values over many decades, with zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 256, generator=generator) * 10 ** (-6 * torch.rand(count, 256, generator=generator))
    return torch.where(torch.rand(count, 256, generator=generator) < 0.1, 0.0, values)


@pytest.mark.parametrize("signed", [True, False])
def test_their_maps_are_ours(bnb: Any, signed: bool) -> None:
    made = bnb.functional.create_dynamic_map(signed=signed)
    own = ops.dynamic_map(signed, torch.device("cpu"))
    assert int((made.view(torch.int32) - own.view(torch.int32)).abs().max()) <= 1


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1.0, 1e30])
def test_their_decoder_on_a_cpu_is_exact(bnb: Any, signed: bool, scale: float) -> None:
    """Bit for bit the product of value and scale, for every code."""
    assert bnb is not None
    codes = torch.arange(256, dtype=torch.uint8).expand(7, 256).contiguous()
    absmax = scale * torch.rand(7, generator=torch.Generator().manual_seed(0))
    qmap = ops.dynamic_map(signed, torch.device("cpu"))
    decoded = torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, qmap, 256, torch.float32)
    assert torch.equal(decoded, ops.dequantize(codes, absmax, qmap))


def test_their_encoder_on_a_cpu_is_not_exact(bnb: Any, record_property: Any) -> None:
    """It goes through a table of 65,536 bins: 0 does not come back as 0, and the smallest codes are never taken.

    When this fails, they are exact, and the backend may use their encoder too.
    """
    assert bnb is not None
    x, qmap = blocks(0), ops.dynamic_map(True, torch.device("cpu"))
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(x, qmap, 256)
    exact, scales = ops.quantize_signed(x, ops.boundaries(qmap))
    assert torch.equal(absmax, scales)
    back = ops.dequantize(codes, absmax, qmap)
    zeros = (back / absmax.unsqueeze(-1))[x == 0].abs()
    wrong = float((codes != exact).float().mean())
    record_property("codes that are not the nearest", wrong)
    print(f"{wrong:.2%} of the codes are not the nearest, 0 comes back as {float(zeros.max()):.1e} of the scale")
    assert wrong > 0.01
    assert 1e-6 < float(zeros.max()) < 1e-3


# The backend


@DTYPES
@pytest.mark.parametrize("settings", [{}, {"adaptive_lr": False}, {"ortho_mode": None}], ids=str)
def test_the_backend_gives_the_bits_of_eager(bnb: Any, settings: dict[str, Any], dtype: torch.dtype) -> None:
    assert bnb is not None
    eager, other = (
        DolphinFlow8bit(parameters(SHAPES, dtype=dtype), lr=0.01, backend=backend, **settings)
        for backend in ("eager", "bitsandbytes")
    )
    for optimizer in (eager, other):
        run(optimizer, 3)
    assert held(all_parameters(eager)) == held(all_parameters(other))
    assert {plan.backend for plan in other.explain()} == {"bitsandbytes"}


def test_the_backend_refuses_other_devices(bnb: Any) -> None:
    """What would run there was not measured."""
    from trysquare import _bitsandbytes

    assert bnb is not None
    with pytest.raises(ValueError, match=r"weight is on meta: backend='bitsandbytes' decodes on a CPU only"):
        _bitsandbytes.check_device(torch.device("meta"), "weight")


def test_gradients_are_left_alone(bnb: Any) -> None:
    assert bnb is not None
    optimizer = DolphinFlow8bit(parameters(SHAPES), backend="bitsandbytes")
    give_gradients(all_parameters(optimizer), seed=1)
    before = [bits(p.grad) for p in all_parameters(optimizer)]
    optimizer.step()
    assert [bits(p.grad) for p in all_parameters(optimizer)] == before
