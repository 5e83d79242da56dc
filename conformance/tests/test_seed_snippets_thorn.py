"""Every snippet of THORN's own documentation runs as written, and does what the text around it promises."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

import trysquare

IMPORT = """
from thorn import THORN
"""

ADAMW_BEFORE = """
optim = AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
"""
THORN_AFTER = """
optim = THORN(model, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
"""

GROUPS = """
optim = THORN([
	{
		'orthogonalize': True,
		'params': [p for k, p in model.named_parameters() if p.ndim >= 2 and k not in ['output', 'embed']],
		'lr': 0.001,
		'betas': (0.95, 0.95),
		'weight_decay': 0.1
	},
	{
		'orthogonalize': False,
		'params': [p for k, p in model.named_parameters() if p.ndim < 2 or k in ['output', 'embed']],
		'lr': 0.001,
		'betas': (0.9, 0.995),
		'weight_decay': 0.03
	}
])
"""

RELEASE = """
model = MyModel().to(dtype=torch.bfloat16)

gradient_accumulation_steps = 16

optimizer = THORN(...)
# enable gradient release mode
optimizer.setup_gradient_release(model, update_rate=gradient_accumulation_steps)
# traditional gradient accumulation doesn't work; set update_rate to approximate it instead

scheduler = CosineAnnealingLR(optimizer, ...) # optional

for i, item in enumerate(dataset):
	loss = model(item)
	loss.backward() # <- optimization is done here...

	if (i + 1) % gradient_accumulation_steps == 0:
		# ...so no need to manually step THORN when gradient release is used!
		#optimizer.step()
		#optimizer.zero_grad()

		# but do step the scheduler if you're using one
		scheduler.step()
"""


def run(snippet: str, **given: Any) -> dict[str, Any]:
    """The snippet's names after it ran in a module of its own."""
    names = {"__name__": "__main__", "torch": torch, "AdamW": AdamW, "CosineAnnealingLR": CosineAnnealingLR, **given}
    exec(compile(IMPORT + snippet, "<snippet>", "exec"), names)  # noqa: S102 - the text of this repository
    return names


class MyModel(nn.Module):
    """Embedding, convolution, norm and output, named as the groups of the snippet expect; gives its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Parameter(torch.randn(12, 8) / 8)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.hidden = nn.Linear(8, 16)
        self.output = nn.Parameter(torch.randn(12, 16) / 16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed[tokens]
        x = self.norm(x + self.convolution(x.mT).mT)
        logits = self.hidden(x).relu() @ self.output.mT
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


TOKENS = torch.arange(12).view(2, 6)


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 30) -> list[float]:
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(TOKENS)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_the_import_gives_our_class() -> None:
    assert run("")["THORN"] is trysquare.THORN


def test_it_replaces_adamw_with_the_same_arguments() -> None:
    before = run(ADAMW_BEFORE, model=MyModel())
    after = run(THORN_AFTER, model=MyModel())
    assert type(after["optim"]) is trysquare.THORN
    for names in (before, after):
        found = losses(names["model"], names["optim"])
        assert found[-1] < found[0]
    (matrices, others), (adamw,) = after["optim"].param_groups, before["optim"].param_groups
    for group in (matrices, others):
        assert {name: group[name] for name in ("lr", "betas", "weight_decay")} == {
            name: adamw[name] for name in ("lr", "betas", "weight_decay")
        }


def test_the_groups_do_what_they_say() -> None:
    names = run(GROUPS, model=MyModel())
    optimizer = names["optim"]
    matrices, others = optimizer.param_groups
    assert [tuple(p.shape) for p in matrices["params"]] == [(8, 8, 3), (16, 8)]
    assert len(others["params"]) == 6
    assert (matrices["betas"], others["betas"]) == ((0.95, 0.95), (0.9, 0.995))
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.03)
    found = losses(names["model"], optimizer)
    assert found[-1] < found[0]


def test_beta2_of_zero_saves_memory() -> None:
    """Can also be set to 0 to disable NorMuon entirely: the rows' state is not there then."""
    with_rows, without = (trysquare.THORN(nn.Linear(8, 4, bias=False), betas=(0.9, b)) for b in (0.95, 0.0))
    assert with_rows.explain()[0].state_bytes - without.explain()[0].state_bytes == 4 * 4


def test_none_grad_is_on_and_can_be_turned_off() -> None:
    for none_grad in (None, True, False):
        model = MyModel()
        optimizer = trysquare.THORN(model, **({} if none_grad is None else {"none_grad": none_grad}))
        model(TOKENS).backward()
        optimizer.step()
        assert all((p.grad is None) == (none_grad is not False) for p in model.parameters())


def test_rectify_is_off_and_holds_the_first_steps_back() -> None:
    moved = []
    for settings in ({}, {"rectify": True}):
        model = MyModel()
        before = model.hidden.weight.detach().clone()
        losses(model, trysquare.THORN(model, **settings), 4)
        moved.append(not torch.equal(before, model.hidden.weight))
    assert moved == [True, False]


@pytest.mark.parametrize(("target_rms", "low", "high"), [(0.2, 0.15, 0.25), (0.4, 0.3, 0.5)])
def test_target_rms_is_the_size_of_an_update(target_rms: float, low: float, high: float) -> None:
    """Roughly: the polar factor is approximate."""
    model = nn.Linear(64, 48, bias=False)
    before = model.weight.detach().clone()
    model.weight.grad = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    trysquare.THORN(model, lr=1.0, weight_decay=0.0, target_rms=target_rms).step()
    assert low < float((model.weight.detach() - before).square().mean().sqrt()) < high


def released(update_rate: int, items: int) -> tuple[MyModel, trysquare.THORN, Any]:
    """The snippet with its dots filled in."""
    snippet = RELEASE.replace("THORN(...)", "THORN(model, lr=0.02)").replace("(optimizer, ...)", "(optimizer, 100)")
    snippet = snippet.replace("accumulation_steps = 16", f"accumulation_steps = {update_rate}")
    names = run(snippet, MyModel=MyModel, dataset=[TOKENS] * items)
    return names["model"], names["optimizer"], names["scheduler"]


def test_gradient_release_as_documented() -> None:
    """In bfloat16, sixteen backward passes to an update, a scheduler beside it, no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer, scheduler = released(16, 48)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert {int(state["step"]) for state in optimizer.state.values()} == {48}
    assert scheduler.last_epoch == 3
    begun = MyModel().to(dtype=torch.bfloat16)
    assert all(not torch.equal(p, q) for p, q in zip(begun.parameters(), model.parameters(), strict=True))


def test_gradient_release_learns() -> None:
    start = MyModel().to(dtype=torch.bfloat16)(TOKENS).item()
    for rate, passes in ((1, 40), (4, 160)):
        model, _, _ = released(rate, passes)
        assert model(TOKENS).item() < start / 2
