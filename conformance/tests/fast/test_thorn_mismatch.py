"""Weights that were saved in one mode beside a state that was saved in the other are refused when first used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trysquare import THORN
from trysquare._fingerprint import CHUNK, fingerprint
from trysquare_conformance.behaviour import nothing_changes, run, written

Make = Callable[[], nn.Module]
Use = Callable[[THORN, nn.Module], object]


class Tied(nn.Module):
    """An embedding whose weight makes the logits, of 16 entries a bias in float32, and a matrix."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 4, dtype=dtype)
        self.body = nn.Linear(4, 4, dtype=dtype)
        self.head = nn.Linear(4, 5, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def trained(dtype: torch.dtype) -> tuple[nn.Module, THORN]:
    model = Tied(dtype)
    optimizer = THORN(model, lr=0.05)
    run(optimizer, 4)
    return model, optimizer


def saved(dtype: torch.dtype, weights: str, state: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Files of a model and of its optimizer, each written in a mode of its own."""
    model, optimizer = trained(dtype)
    getattr(optimizer, weights)()
    kept = written(model.state_dict())
    getattr(optimizer, state)()
    return kept, written(optimizer.state_dict())


def loaded(dtype: torch.dtype, weights: str, state: str, *, model_first: bool = True) -> tuple[nn.Module, THORN]:
    """A new process with the two files."""
    model_file, optimizer_file = saved(dtype, weights, state)
    model = Tied(dtype)
    optimizer = THORN(model, lr=0.05)
    if model_first:
        model.load_state_dict(model_file)
    optimizer.load_state_dict(optimizer_file)
    if not model_first:
        model.load_state_dict(model_file)
    return model, optimizer


def stepping(optimizer: THORN, _: nn.Module) -> None:
    if not optimizer._training:
        optimizer.train()
    run(optimizer, 1)


def releasing(optimizer: THORN, model: nn.Module) -> None:
    optimizer.setup_gradient_release(model)
    model.body(model.embedding(torch.arange(3))).sum().backward()


USES: dict[str, Use] = {
    "step": stepping,
    "train": lambda optimizer, _: optimizer.train(),
    "eval": lambda optimizer, _: optimizer.eval(),
    "averaged": lambda optimizer, _: optimizer.averaged().__enter__(),
    "export": lambda optimizer, model: optimizer.export_state_dict(model),
    "save": lambda optimizer, _: optimizer.state_dict(),
}


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("weights", "state"), [("train", "eval"), ("eval", "train")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_the_other_mode_are_refused(
    dtype: torch.dtype, weights: str, state: str, use: str, model_first: bool
) -> None:
    model, optimizer = loaded(dtype, weights, state, model_first=model_first)
    says = f"the optimizer's state was saved in {state} mode, but the parameters hold the"
    for _ in range(2):
        with nothing_changes(optimizer, but=("parameters",)), pytest.raises(RuntimeError, match=says) as error:
            USES[use](optimizer, model)
        assert f"load the model's weights that were saved in {state} mode too" in str(error.value)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_the_same_mode_go_on(dtype: torch.dtype, use: str, mode: str) -> None:
    model, optimizer = loaded(dtype, mode, mode)
    USES[use](optimizer, model)
    optimizer.train()
    run(optimizer, 1)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_backward_pass_of_gradient_release_notices_it_too(mode: str) -> None:
    other = {"train": "eval", "eval": "train"}[mode]
    model, optimizer = loaded(torch.float32, mode, other)
    says = "saved in train mode" if other == "train" else "in eval mode"
    with pytest.raises(RuntimeError, match=says):
        releasing(optimizer, model)


def test_the_right_weights_mend_it() -> None:
    model, optimizer = loaded(torch.float32, "eval", "train")
    with pytest.raises(RuntimeError, match="saved in train mode too"):
        run(optimizer, 1)
    model.load_state_dict(saved(torch.float32, "train", "train")[0])
    run(optimizer, 1)


def test_other_weights_are_nobodys_business() -> None:
    """Fine-tuning from elsewhere, or an average over replicas: neither is the other mode."""
    model, optimizer = loaded(torch.float32, "eval", "train")
    with torch.no_grad():
        model.embedding.weight[0, 0] += 1
    run(optimizer, 1)


def test_exported_weights_are_those_of_eval_mode() -> None:
    model, optimizer = trained(torch.float32)
    exported, state = optimizer.export_state_dict(model), optimizer.state_dict()
    model.load_state_dict(exported)
    optimizer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="hold the averaged weights, of eval mode"):
        run(optimizer, 1)


def test_where_both_modes_have_the_same_weights_nothing_is_refused() -> None:
    """Before the first step, or without anything to average."""
    model = Tied(torch.float32)
    optimizer = THORN(model)
    for mode in ("eval", "train"):
        getattr(optimizer, mode)()
        again = THORN(model)
        again.load_state_dict(written(optimizer.state_dict()))
        again.train()
    run(optimizer, 1)


def test_the_check_is_made_once() -> None:
    """It reads the parameters, so a run must not pay for it in every step."""
    _, optimizer = loaded(torch.float32, "train", "train")
    assert optimizer._loaded
    run(optimizer, 1)
    assert not optimizer._loaded


def test_checkpoints_on_disk(tmp_path: Path) -> None:
    """As everybody does it: one file, read with weights_only."""
    model, optimizer = trained(torch.float32)
    optimizer.eval()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    found = torch.load(tmp_path / "last.pt", weights_only=True)
    again = Tied(torch.float32)
    again.load_state_dict(found["model"])
    other = THORN(again)
    other.load_state_dict(found["optimizer"])
    other.train()
    optimizer.train()
    run(optimizer, 1)
    run(other, 1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


# The fingerprint


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fingerprint_sees_every_bit_and_place(dtype: torch.dtype) -> None:
    x = torch.linspace(-1, 1, 12).to(dtype)
    own = fingerprint([x])
    assert fingerprint([x.clone()]) == own
    assert fingerprint([x.view(3, 4)]) == own
    assert fingerprint([x[:5], x[5:]]) == own
    seen = {own}
    for i in range(12):
        flipped = x.clone()
        flipped[i] = -flipped[i]
        seen.add(fingerprint([flipped]))
        swapped = x.clone()
        swapped[[i, (i + 1) % 12]] = x[[(i + 1) % 12, i]]
        seen.add(fingerprint([swapped]))
    assert len(seen) == 1 + 2 * 12


def test_a_fingerprint_does_not_depend_on_layout_or_chunks() -> None:
    x = torch.randn(700, 3000, generator=torch.Generator().manual_seed(0))
    assert x.numel() > CHUNK
    own = fingerprint([x])
    assert fingerprint([x.mT.contiguous().mT]) == own
    assert fingerprint([*x.split(100)]) == own
    assert 0 <= own < 1 << 63


def test_nothing_has_a_fingerprint_too() -> None:
    assert fingerprint([]) == fingerprint([torch.zeros(0, 3)]) == 0
