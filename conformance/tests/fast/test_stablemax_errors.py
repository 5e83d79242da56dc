"""What StableMax's cross-entropy refuses: with the exception of `F.cross_entropy`, naming argument, value and fix."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trysquare import StableMaxCrossEntropyLoss, _backend, log_stablemax, stablemax, stablemax_cross_entropy

X = torch.zeros(3, 4)
Y = torch.tensor([0, 1, 2])
P = torch.full((3, 4), 0.25)
IMAGE, TURNED = torch.zeros(3, 4, 5, 6), torch.zeros(3, 6, 5, dtype=torch.int64)
LEARNT = torch.ones(4, requires_grad=True)


@dataclass(frozen=True)
class Bad:
    """Arguments, the exception, and what its message must say. `stricter`: torch lets it pass, or finds other words."""

    name: str
    error: type[Exception]
    says: str
    input: Any = X
    target: Any = Y
    options: tuple[tuple[str, Any], ...] = ()
    stricter: bool = False


def bad(name: str, error: type[Exception], says: str, *, stricter: bool = False, **changed: Any) -> Bad:
    tensors = {name: changed.pop(name) for name in ("input", "target") if name in changed}
    return Bad(name, error, says, **tensors, options=tuple(changed.items()), stricter=stricter)


BAD = [
    bad("index too large", IndexError, "target contains 4.*from 0 to 3", target=torch.tensor([0, 4, 1])),
    bad("index negative", IndexError, "target contains -1.*ignore_index=-100", target=torch.tensor([0, -1, 1])),
    bad("not what is ignored", IndexError, "target contains -100", target=torch.tensor([0, -100, 1]), ignore_index=1),
    bad("no classes", IndexError, "input has 0 classes", input=X[:, :0]),
    bad("fewer targets", ValueError, r"target has shape \(2,\).*\(3,\) for class indices", target=Y[:2]),
    bad("more dimensions", RuntimeError, r"target has shape \(3, 1\)", target=Y[:, None]),
    bad("other probabilities", RuntimeError, r"\(3, 4\) for class probabilities", target=torch.zeros(3, 5)),
    bad("other image", RuntimeError, r"target has shape \(3, 6, 5\)", input=IMAGE, target=TURNED),
    bad("unbatched, two targets", ValueError, r"it must be \(\)", input=X[0], target=Y[:2]),
    bad("scalar logits", RuntimeError, "dimension of classes", input=torch.tensor(1.0), target=torch.tensor(0)),
    bad("int32 target", RuntimeError, r"target has dtype torch.int32.*target.long\(\)", target=Y.int()),
    bad("boolean target", RuntimeError, "target has dtype torch.bool", target=Y.bool()),
    bad("float target", RuntimeError, "target has dtype torch.float32", target=Y.float()),
    bad("integer probabilities", RuntimeError, "class probabilities must be floating-point", target=P.long()),
    bad("ignored probabilities", RuntimeError, "ignore_index=1: class probabilities", target=P, ignore_index=1),
    bad("integer logits", NotImplementedError, "input has dtype torch.int64", input=X.long()),
    bad("complex logits", NotImplementedError, "input has dtype torch.complex64", input=X.to(torch.complex64)),
    bad("list as logits", TypeError, "input is list", input=[[0.0]]),
    bad("list as target", TypeError, "target is list", target=[0, 1, 2]),
    bad("list as weight", TypeError, "weight is list", weight=[1.0, 1.0, 1.0, 1.0]),
    bad("short weight", RuntimeError, r"weight has shape \(3,\).*4 classes", weight=torch.ones(3)),
    bad("weight of two dimensions", RuntimeError, r"weight has shape \(1, 4\)", weight=torch.ones(1, 4)),
    bad("integer weight", RuntimeError, "weight has dtype torch.int64", weight=torch.ones(4, dtype=torch.int64)),
    bad("weight to be learnt", RuntimeError, "weight requires a gradient", weight=LEARNT),
    bad("target elsewhere", RuntimeError, "target is on meta and input on cpu", target=Y.to("meta")),
    bad("weight elsewhere", RuntimeError, "weight is on meta and input on cpu", weight=torch.ones(4, device="meta")),
    bad("unknown reduction", ValueError, "reduction='average'", reduction="average"),
    bad("no reduction", ValueError, "reduction=None", reduction=None),
    bad("smoothing above 1", RuntimeError, "label_smoothing=1.5: must be between", label_smoothing=1.5),
    bad("smoothing below 0", RuntimeError, "label_smoothing=-0.5", label_smoothing=-0.5, stricter=True),
    bad("smoothing NaN", RuntimeError, "label_smoothing=nan", label_smoothing=float("nan"), stricter=True),
    bad("smoothing a string", TypeError, "label_smoothing='a'", label_smoothing="a"),
    bad("smoothing a boolean", TypeError, "label_smoothing=True", label_smoothing=True, stricter=True),
    bad("ignore_index a float", TypeError, "ignore_index=1.5", ignore_index=1.5),
    bad("ignore_index a boolean", TypeError, "ignore_index=True", ignore_index=True, stricter=True),
    bad("unknown backend", ValueError, "backend='cuda': must be 'auto', 'eager' or 'triton'", backend="cuda"),
    bad("compiled backend", ValueError, "backend='compiled': must be", backend="compiled"),
    bad("no backend", ValueError, "backend=None", backend=None),
    bad("backend a list", ValueError, r"backend=\['triton'\]", backend=["triton"]),
]  # fmt: skip


OF_TORCH_TOO = [one for one in BAD if not one.stricter and "backend" not in dict(one.options)]
SETTINGS = [{"reduction": "average"}, {"label_smoothing": 2.0}, {"ignore_index": "a"}, {"backend": "fastest"}]


@pytest.mark.parametrize("one", BAD, ids=lambda one: one.name)
def test_bad_input_is_named(one: Bad) -> None:
    with pytest.raises(one.error, match=one.says):
        stablemax_cross_entropy(one.input, one.target, **dict(one.options))


@pytest.mark.parametrize("one", OF_TORCH_TOO, ids=lambda one: one.name)
def test_the_exception_is_the_one_of_torch(one: Bad) -> None:
    def attempt() -> Tensor:
        return F.cross_entropy(one.input, one.target, **dict(one.options))

    older = (one.error, RuntimeError)  # what is a subclass of it today, or a better word for it
    with pytest.raises(older):
        attempt()


def test_nothing_is_refused_that_torch_takes() -> None:
    for target in (Y, P, Y.to(torch.uint8), torch.tensor([-100, 3, 0])):
        for options in ({}, {"ignore_index": -5}, {"label_smoothing": 1}, {"label_smoothing": 0}):
            if not (target.dtype is torch.int64 and -100 in target and options):
                F.cross_entropy(X, target, **options)
                stablemax_cross_entropy(X, target, **options)


@pytest.mark.parametrize("function", [stablemax, log_stablemax])
def test_the_functions_name_what_they_refuse(function: Any) -> None:
    with pytest.raises(TypeError, match="x is list"):
        function([1.0], 0)
    with pytest.raises(NotImplementedError, match=r"x has dtype torch.int64.*float16, bfloat16, float32, float64"):
        function(Y, 0)
    with pytest.raises(IndexError, match="2"):
        function(X, 2)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_module_refuses_its_settings_when_it_is_made(settings: dict[str, Any]) -> None:
    with pytest.raises((ValueError, RuntimeError, TypeError), match=next(iter(settings))):
        StableMaxCrossEntropyLoss(**settings)


def test_triton_is_refused_and_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = r"backend='triton': stablemax_cross_entropy needs .*'auto' or 'eager'"
    for ask in (lambda: StableMaxCrossEntropyLoss(backend="triton"), lambda: loss_by_kernels(Y)):
        with pytest.raises((ValueError, ImportError), match=refused):
            ask()


def test_triton_needs_the_logits_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_backend, "check", lambda *_: None)
    with pytest.raises(ValueError, match=r"input is on cpu and backend='triton': .*GPUs; use 'auto' or 'eager'"):
        loss_by_kernels(Y)


def test_triton_has_no_kernel_for_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "only_recorded", True)
    monkeypatch.setattr(_backend, "check", lambda *_: None)
    with pytest.raises(ValueError, match=r"backend='triton': target holds class probabilities.*'auto' or 'eager'"):
        loss_by_kernels(P)


def loss_by_kernels(target: Tensor) -> Tensor:
    return stablemax_cross_entropy(X, target, backend="triton")
