"""A model says nothing about its parameters: THORN assigns each to a kind of group, and `explain` says why."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trysquare import THORN
from trysquare_conformance.behaviour import all_parameters, held, nothing_changes, run
from trysquare_conformance.behaviour_thorn import thorn


class Small(nn.Module):
    """A language model with a layer of each usual type; its head is the embedding's weight."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 6)
        self.places = nn.Parameter(torch.ones(4, 6))
        self.convolution = nn.Conv1d(6, 6, 3, padding=1)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.experts = nn.Parameter(torch.eye(6).repeat(2, 1, 1))
        self.output = nn.Linear(6, 10, bias=False)
        if tied:
            self.output.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places
        x = x + self.convolution(x.mT).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.norm(x @ self.experts[0] @ self.experts[1])
        return self.output(x)


def assigned(optimizer: THORN) -> dict[str, bool]:
    """Whether each parameter is orthogonalized, by name."""
    return {name: group["orthogonalize"] for group in optimizer.param_groups for name in group.get("param_names", [])}


def reasons(optimizer: THORN) -> dict[str, str]:
    """The words in the last parentheses of each rule."""
    return {plan.name: plan.rule.rpartition("(")[2].rstrip(")") for plan in optimizer.explain()}


def test_matrices_are_orthogonalized_and_nothing_else() -> None:
    optimizer = THORN(Small())
    assert assigned(optimizer) == {
        "places": True,
        "convolution.weight": True,
        "attention.in_proj_weight": True,
        "attention.out_proj.weight": True,
        "experts": True,
        "tokens.weight": False,
        "convolution.bias": False,
        "attention.in_proj_bias": False,
        "attention.out_proj.bias": False,
        "norm.weight": False,
        "norm.bias": False,
    }
    assert reasons(optimizer)["tokens.weight"] == "weight of an embedding"
    assert reasons(optimizer)["norm.weight"] == "fewer than two dimensions"
    assert reasons(optimizer)["places"] == "a matrix"


def test_a_model_trains() -> None:
    torch.manual_seed(0)
    model, tokens = Small(), torch.arange(4).repeat(8, 1)
    optimizer, losses = THORN(model, lr=0.02), []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_a_tied_head_counts_as_the_embedding_under_either_name() -> None:
    """By identity: also where the head comes first, so that the weight goes by the head's name."""
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    embedding.weight = head.weight
    optimizer = THORN(nn.ModuleDict({"head": head, "embedding": embedding}))
    assert assigned(optimizer) == {"head.weight": False}
    assert len(all_parameters(optimizer)) == 1
    assert assigned(THORN(Small(tied=False)))["output.weight"]


def test_an_embedding_bag_is_an_embedding() -> None:
    assert assigned(THORN(nn.Sequential(nn.EmbeddingBag(5, 3)))) == {"0.weight": False}


@pytest.mark.parametrize("name", ["lm_head", "model_lm_head_2"])
def test_an_lm_head_makes_logits(name: str) -> None:
    model = nn.ModuleDict({name: nn.Linear(3, 5), "body": nn.Linear(3, 3)})
    optimizer = THORN(model)
    assert [n for n, is_one in assigned(optimizer).items() if is_one] == ["body.weight"]
    assert reasons(optimizer)[f"{name}.weight"] == "lm_head in its name"


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (("output.*",), {"places", "experts", "convolution.weight", "attention.in_proj_weight"}),
        (["*.weight", "places"], {"experts", "attention.in_proj_weight"}),
        (("OUTPUT.*", "nothing"), {"places", "experts", "convolution.weight", "attention.in_proj_weight"}),
        (("exper[a-z]s", "?laces"), {"convolution.weight", "attention.in_proj_weight"}),
    ],
)
def test_patterns_exclude_by_full_names(patterns: Any, left: set[str]) -> None:
    """Case counts, as in `fnmatchcase`, so that a name means the same on every system."""
    optimizer = THORN(Small(tied=False), exclude=patterns)
    kept = {name for name, is_one in assigned(optimizer).items() if is_one}
    assert kept - {"attention.out_proj.weight", "output.weight"} == left
    assert ("output.weight" in kept) == ("OUTPUT.*" in patterns or "?laces" in patterns)


def test_explain_names_the_pattern() -> None:
    optimizer = THORN(Small(tied=False), exclude=("nothing", "out*"))
    assert reasons(optimizer)["output.weight"] == "excluded by 'out*'"


def test_a_model_of_one_kind_has_one_group() -> None:
    assert [g["orthogonalize"] for g in THORN(nn.LayerNorm(3)).param_groups] == [False]
    assert [g["orthogonalize"] for g in THORN(nn.Linear(3, 2, bias=False)).param_groups] == [True]


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got no parameters|empty parameter list"):
        THORN(nn.ReLU())


def test_frozen_parameters_are_assigned_and_stay() -> None:
    """As in `torch.optim`: whether they move is decided by their gradient."""
    model = nn.Linear(3, 2).requires_grad_(requires_grad=False)
    optimizer, before = THORN(model), held([*model.parameters()])
    optimizer.step()
    assert assigned(optimizer) == {"weight": True, "bias": False}
    assert held([*model.parameters()]) == before


# What explain tells


def test_explain_tells_shape_rate_products_and_backend() -> None:
    model = nn.ModuleDict({"wide": nn.Conv2d(3, 4, 2, bias=False), "square": nn.Linear(400, 400, bias=False)})
    optimizer = THORN(model, matmul_dtype=torch.float32)
    wide, square = optimizer.explain()
    assert wide.rule == "orthogonalized as 4 x 12, rate x 0.6928, gram form in float32 (a matrix)"
    assert square.rule == "orthogonalized as 400 x 400, rate x 4, standard form in float32 (a matrix)"
    assert {plan.backend for plan in (wide, square)} == {"eager"}
    assert THORN(model, target_rms=0.0).explain()[0].rule.startswith("orthogonalized as 4 x 12, rate x 1, ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_run_in_what_was_asked_for(dtype: torch.dtype) -> None:
    optimizer = THORN(nn.Linear(4, 3), matmul_dtype=dtype)
    assert str(dtype).removeprefix("torch.") in optimizer.explain()[0].rule


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_explain_counts_the_bytes_that_there_are(dtype: torch.dtype) -> None:
    optimizer = thorn(dtype=dtype)
    with nothing_changes(optimizer):
        promised = [plan.state_bytes for plan in optimizer.explain()]
    run(optimizer, 1)
    kept = [optimizer.state[p].values() for p in all_parameters(optimizer)]
    assert promised == [sum(x.numel() * x.element_size() for x in state) for state in kept]


def test_state_is_what_the_specification_allows() -> None:
    """One buffer and rows a matrix, two a float32 parameter, three where a parameter is a rounding; numbers beside."""
    buffers = {"matrix": 1, torch.float32: 2, torch.bfloat16: 3}
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.ModuleDict({"m": nn.Linear(50, 40, bias=False), "v": nn.LayerNorm(100, bias=False)}).to(dtype)
        matrix, vector = THORN(model).explain()
        assert matrix.state_bytes == 4 * (2000 * buffers["matrix"] + 40) + 8
        assert vector.state_bytes == 4 * 100 * buffers[dtype] + 3 * 8
