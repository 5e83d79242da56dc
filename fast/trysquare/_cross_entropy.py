"""What a cross-entropy accepts: the checks and exceptions of `torch.nn.functional.cross_entropy`, in plainer words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trysquare import _backend

BACKENDS = ("auto", "eager", "triton")
WITHOUT_TRITON = "'auto' or 'eager'"
REDUCTIONS = ("mean", "sum", "none")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDICES = (torch.int64, torch.uint8)


def check(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> None:
    """Raise what `F.cross_entropy` would raise, naming the argument, its value and what is allowed.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown reduction; a target for another number of positions.
        RuntimeError: a shape, dtype, device or number that does not fit; an `ignore_index` ≥ 0 with probabilities.
        NotImplementedError: logits that are not real floating-point numbers.
        IndexError: a class index out of range, on the CPU (a GPU stops with an assertion, since to look would make the
            host wait for it).
    """
    check_settings(ignore_index, reduction, label_smoothing)
    check_logits(x, "input")
    if x.ndim == 0:
        raise RuntimeError("input is a single number: it must have a dimension of classes, (C) or (N, C, d1, ...)")
    _check_beside(x, target, "target")
    if is_probabilities(x, target):
        _check_probabilities(target, ignore_index)
    else:
        _check_indices(x, target, ignore_index)
    if weight is not None:
        _check_weight(x, target, weight)


def check_logits(x: Tensor, name: str) -> None:
    """Raise unless these are real floating-point numbers of a precision to compute with."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}: it must be a Tensor")
    if x.dtype not in FLOATS:
        raise NotImplementedError(f"{name} has dtype {x.dtype}: it must be one of {_names(FLOATS)}; convert it first")


def is_probabilities(x: Tensor, target: Tensor) -> bool:
    """A target of the logits' own shape holds class probabilities, as in torch."""
    return x.shape == target.shape


def check_settings(ignore_index: Any, reduction: Any, label_smoothing: Any) -> None:
    """Raise unless these three settings can be meant, whatever the tensors are."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: must be 'mean', 'sum' or 'none'")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index={ignore_index!r}: must be an int")
    if not isinstance(label_smoothing, (float, int)) or isinstance(label_smoothing, bool):
        raise TypeError(f"label_smoothing={label_smoothing!r}: must be a float")
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing={label_smoothing!r}: must be between 0.0 and 1.0")


def check_backend(backend: Any) -> None:
    """Raise unless this is a backend of the loss that this machine has.

    Raises:
        ValueError: an unknown one, or Triton finds nothing to run on.
        ImportError: Triton is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be 'auto', 'eager' or 'triton'")
    _backend.check(backend, "stablemax_cross_entropy", WITHOUT_TRITON)


def chosen_backend(backend: str, x: Tensor, target: Tensor) -> str:
    """What computes this loss: "eager" or "triton". In a trace there is nothing left to choose.

    Raises:
        ValueError: Triton was asked for and has no kernel for this target, or does not run on this device.
    """
    if torch.compiler.is_compiling():
        return "eager"
    if backend == "triton":
        _backend.check_device(x.device, "input", WITHOUT_TRITON)
        if is_probabilities(x, target):
            raise ValueError(
                "backend='triton': target holds class probabilities, and there are kernels for class indices only; "
                f"use {WITHOUT_TRITON}"
            )
    return "eager" if is_probabilities(x, target) else _backend.choose(backend, x.device)


def _check_beside(x: Tensor, other: Any, name: str) -> None:
    if not isinstance(other, Tensor):
        raise TypeError(f"{name} is {type(other).__name__}: it must be a Tensor")
    if other.device != x.device:
        raise RuntimeError(f"{name} is on {other.device} and input on {x.device}: use {name}.to(input.device)")


def _check_probabilities(target: Tensor, ignore_index: int) -> None:
    if target.dtype not in FLOATS:
        raise RuntimeError(
            f"target has dtype {target.dtype} and the shape of input: class probabilities must be floating-point, "
            "and class indices must not have the dimension of classes"
        )
    if ignore_index >= 0:
        raise RuntimeError(f"ignore_index={ignore_index}: class probabilities have no index to ignore; leave it out")


def _check_indices(x: Tensor, target: Tensor, ignore_index: int) -> None:
    expected = (*x.shape[:1], *x.shape[2:]) if x.ndim > 1 else ()
    if target.shape != expected and not (x.ndim == 1 and target.shape == (1,)):
        kind = RuntimeError if x.ndim > 1 and target.shape[:1] == expected[:1] else ValueError
        raise kind(
            f"target has shape {tuple(target.shape)}: for an input of shape {tuple(x.shape)} it must be "
            f"{tuple(expected)} for class indices or {tuple(x.shape)} for class probabilities"
        )
    if target.dtype not in INDICES:
        raise RuntimeError(f"target has dtype {target.dtype}: class indices must be torch.int64; use target.long()")
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(target, x.shape[min(1, x.ndim - 1)], ignore_index)


def _check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """Reads the values, which only costs nothing on the CPU."""
    if not target.numel() or _within(target, classes):
        return
    counted = target[target != ignore_index]
    if counted.numel() and not _within(counted, classes):
        wrong = int(counted[(counted < 0) | (counted >= classes)][0])
        raise IndexError(
            f"target contains {wrong}: a class index must be from 0 to {classes - 1} (input has {classes} classes) "
            f"or ignore_index={ignore_index}"
        )


def _within(target: Tensor, classes: int) -> bool:
    low, high = target.aminmax()
    return int(low) >= 0 and int(high) < classes


def _check_weight(x: Tensor, target: Tensor, weight: Tensor) -> None:
    _check_beside(x, weight, "weight")
    classes = x.shape[min(1, x.ndim - 1)]
    if weight.dtype not in FLOATS:
        raise RuntimeError(f"weight has dtype {weight.dtype}: it must be floating-point; use weight.to(input.dtype)")
    if weight.shape != (classes,):
        raise RuntimeError(
            f"weight has shape {tuple(weight.shape)}: it must hold one number for each of the {classes} classes"
        )
    if weight.requires_grad and not is_probabilities(x, target):
        raise RuntimeError(
            "weight requires a gradient, which exists only for class probabilities as target: use weight.detach()"
        )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
