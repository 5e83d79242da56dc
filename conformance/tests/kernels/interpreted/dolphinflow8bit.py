"""DolphinFlow8bit's kernels where operands are awkward, and its coder bit for bit; `test_interpreted` runs this."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from trysquare import DolphinFlow8bit, _backend
from trysquare.kernels import blockwise8bit as kernels
from trysquare.ops import blockwise8bit as ops

CPU = torch.device("cpu")
SHAPES = ((6, 768), (4097,), (12, 10))
SMALL_WORKSPACE = 1 << 15


def contiguous(tensor: Tensor) -> Tensor:
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor


def strided(tensor: Tensor) -> Tensor:
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"))
    view = wide[..., ::2]
    return view.copy_(tensor)


def misaligned(tensor: Tensor) -> Tensor:
    larger = torch.full((tensor.numel() + 3,), float("nan"))
    return larger[3:].view(tensor.shape).copy_(tensor)


def stepped(
    lay_out: Callable[[Tensor], Tensor] = contiguous,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    **options: Any,
) -> list[Tensor]:
    """Parameters and states after two steps."""
    made = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(lay_out(torch.randn(shape, generator=made))) for shape in shapes]
    optimizer = DolphinFlow8bit(parameters, lr=1e-2, backend=options.pop("backend", "triton"), **options)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = lay_out(torch.randn(parameter.shape, generator=made))
        optimizer.step()
    states = [tensor for parameter in parameters for tensor in optimizer.state[parameter].values()]
    return [tensor.detach().clone() for tensor in (*parameters, *states)]


def assert_equal(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of NumPy, which interprets
@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_scales_are_those_of_the_tensor_functions(signed: bool) -> None:
    qmap = ops.dynamic_map(signed, CPU)
    bounds = ops.boundaries(qmap)
    on = torch.cat([bounds[:-1], torch.ones(1)])
    beside = torch.nextafter(on, torch.full_like(on, 2.0)).clamp(max=1.0)
    made = torch.Generator().manual_seed(0)
    x = torch.randn(5, 256, generator=made) * 10.0 ** torch.arange(-42.0, 38.0, 16.0).view(-1, 1)
    x = torch.cat([x, on[None], beside[None], qmap[None], torch.zeros(1, 256), torch.full((1, 256), -0.0), x[:2]])
    x[-2, 7], x[-1, 8] = float("nan"), float("inf")
    x = x if signed else x.abs()
    names = ("quantize_signed", "quantize_unsigned")
    codes, absmax = getattr(kernels, names[not signed])(x, bounds)
    wanted_codes, wanted_absmax = getattr(ops, names[not signed])(x, bounds)
    assert torch.equal(codes, wanted_codes)
    torch.testing.assert_close(absmax, wanted_absmax, rtol=0, atol=0, equal_nan=True)
    decoded, wanted = kernels.dequantize(codes, absmax, qmap), ops.dequantize(codes, absmax, qmap)
    torch.testing.assert_close(decoded, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("lay_out", [transposed, strided, misaligned])
def test_a_layout_changes_nothing(lay_out: Callable[[Tensor], Tensor]) -> None:
    options = {"ortho_mode": None, "gradient_clipping": None, "workspace_bytes": SMALL_WORKSPACE}
    assert_equal(stepped(lay_out, **options), stepped(**options))


def test_windows_know_their_rows() -> None:
    """Each row has its coefficient, and a window begins anywhere in it."""
    shapes = ((6, 768),)
    assert_equal(stepped(transposed, shapes, workspace_bytes=SMALL_WORKSPACE), stepped(transposed, shapes))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_skipped_writes_nothing(value: float) -> None:
    made = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=made)) for shape in SHAPES]
    optimizer = DolphinFlow8bit(parameters, lr=1e-2, backend="triton", nonfinite="skip")
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=made)
    optimizer.step()
    tensors = [*parameters, *(tensor for parameter in parameters for tensor in optimizer.state[parameter].values())]
    before = [tensor.detach().clone() for tensor in tensors]
    parameters[0].grad.view(-1)[5] = value
    optimizer.step()
    assert_equal(tensors, before)
    assert int(optimizer.skipped_steps) == 1


def test_members_of_a_bucket_keep_their_own_maps() -> None:
    """A checkpoint's map may differ by a unit in the last place: its boundaries go with it."""
    parameters = [torch.nn.Parameter(torch.ones(64, 64)) for _ in range(2)]
    optimizer = DolphinFlow8bit(parameters, lr=1e-2, backend="triton", ortho_mode=None)
    for parameter in parameters:
        parameter.grad = torch.full((64, 64), 0.5)
    optimizer.step()
    state = optimizer.state[parameters[1]]
    state["qmap1"] = state["qmap1"] * 2
    for parameter in parameters:
        parameter.grad = torch.zeros(64, 64)
    optimizer.step()
    moved = [1 - float(parameter.detach()[0, 0]) for parameter in parameters]
    assert moved[1] > 1.2 * moved[0]


def test_a_bucket_is_one_launch_where_rows_are_whole_blocks() -> None:
    before = _backend.calls["triton", "_update_blocks"]
    stepped(shapes=((6, 768), (6, 768), (6, 768)), gradient_clipping=None)
    assert _backend.calls["triton", "_update_blocks"] == before + 2
