"""THORN's cases: complete, paired, of both forms; and its reference and its class speak of the same things."""

import inspect
from collections.abc import Iterable
from dataclasses import fields
from itertools import islice, product
from typing import Any

import numpy as np
import pytest
import torch

import trysquare
from trysquare_conformance import inputs, registry
from trysquare_conformance.case import SHORT_DTYPES, Case
from trysquare_conformance.cases import thorn
from trysquare_conformance.lanes import LANES
from trysquare_conformance.noise import BFLOAT16, FLOAT32
from trysquare_conformance.noisy import wrapper
from trysquare_conformance.pairwise import Choice, Factors, uncovered
from trysquare_conformance.snapshots import Feed
from trysquare_conformance.thorn_steps import ALGORITHMIC, KINDS, hyperparameters
from trysquare_reference import thorn as reference

EAGER = LANES["eager-cpu"]
STANDARD = [case for case in registry.select("standard") if case.algorithm == "thorn"]
QUICK = [case for case in STANDARD if case.tier == "quick"]
ONLY_FAST = {"none_grad", "matmul_dtype", "exclude", "nonfinite", "workspace_bytes", "backend"}


def choices(cases: Iterable[Case], factors: Factors) -> list[Choice]:
    """What each case has of these factors, if every level is one of theirs."""
    families = {shapes: name for name, variants in thorn.FAMILIES.items() for shapes in variants}
    levels = [
        {
            **case.hyperparameters,
            **{n: getattr(case, n) for n in ("dtype", "layout", "inputs", "steps")},
            "family": families.get(case.shapes),
        }
        for case in cases
    ]
    mine = [{name: every[name] for name in factors} for every in levels]
    return [choice for choice in mine if all(choice[name] in factors[name] for name in factors)]


def test_hyperparameters_agree_in_name_order_and_default() -> None:
    signature = inspect.signature(trysquare.THORN).parameters
    given = {name: p.default for name, p in signature.items() if name not in ONLY_FAST | {"params"}}
    inner = {"orthogonalize", "form", "restarts", "update_rate"}
    declared = {field.name: field.default for field in fields(reference.Hyperparameters) if field.name not in inner}
    assert list(given.items()) == list(declared.items())
    assert list(signature)[1:4] == ["lr", "betas", "weight_decay"]
    keyword_only = [name for name, p in signature.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert keyword_only == list(signature)[4:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("betas", [(0.9, 0.9), (0.0, 0.0)])
@pytest.mark.parametrize("kind", ["ortho", "batched", "free", "adam"])
@pytest.mark.parametrize("rate", [1, 2])
def test_states_have_the_same_names_and_shapes(
    kind: str, betas: tuple[float, float], dtype: torch.dtype, rate: int
) -> None:
    model = torch.nn.Module()
    parameter = torch.nn.Parameter(torch.ones(2, 3, 4, dtype=dtype))
    model.register_parameter("p", parameter)
    optimizer = trysquare.THORN([{"params": [parameter], **KINDS[kind]}], betas=betas)
    optimizer.setup_gradient_release(model, update_rate=rate)
    parameter.sum().backward()  # type: ignore[no-untyped-call]
    hp = reference.Hyperparameters(betas=betas, update_rate=rate, **KINDS[kind])
    declared = reference.init(np.ones((2, 3, 4)), hp, half=dtype == torch.bfloat16)
    held = optimizer.state[parameter]
    assert {name: tuple(tensor.shape) for name, tensor in held.items()} == {
        name: np.shape(value) for name, value in declared.items()
    }


def test_every_constructor_argument_is_exercised() -> None:
    arguments = set(inspect.signature(trysquare.THORN).parameters) - {"params", "backend", "batched", "schedule_free"}
    values: dict[str, set[Any]] = {name: {case.hyperparameters[name] for case in STANDARD} for name in arguments}
    assert {name for name, seen in values.items() if len(seen) < 2} == set()
    assert {case.hyperparameters["kind"] for case in QUICK} == set(KINDS)
    assert set(ALGORITHMIC) <= arguments | {"schedule_free"}


@pytest.mark.parametrize("factors", [thorn.FORMULAS, thorn.HOSTILE], ids=["formulas", "hostile"])
def test_every_pair_of_levels_occurs(factors: Factors) -> None:
    found = choices(STANDARD, {name: levels for name, levels in factors.items() if name != "family"})
    assert uncovered({name: factors[name] for name in factors if name != "family"}, found, thorn.allowed) == set()


def test_every_pair_of_arguments_occurs() -> None:
    factors = {n: v for n, v in {**thorn.FORMULAS, **thorn.NUMBERS}.items() if n != "family"}
    assert uncovered(factors, choices(STANDARD, factors), thorn.allowed) == set()


def test_the_standard_tier_has_every_input_layout_dtype_and_kind_of_shape() -> None:
    assert {case.inputs for case in STANDARD} == set(inputs.KINDS) - set(thorn.BEYOND)
    assert {case.layout for case in STANDARD} == set(inputs.LAYOUTS)
    assert {case.dtype for case in STANDARD} == set(SHORT_DTYPES)
    assert {len(shape) for case in STANDARD for shape in case.shapes} == {0, 1, 2, 3, 4, 5}
    assert {case.shapes for case in STANDARD} >= {variants[1] for variants in thorn.FAMILIES.values()}


def test_both_forms_occur_in_every_precision_of_products() -> None:
    seen = set()
    for case in QUICK:
        here = thorn.SUBJECT.in_lane(case, EAGER)
        exact = here.hyperparameters["matmul_dtype"] in {"float32", "float64"}
        seen |= {(form, exact) for form, hp in zip(here.hyperparameters["forms"], hyperparameters(here), strict=True)
                 if hp.orthogonalize}  # fmt: skip
    assert {("standard", True), ("gram", True), ("standard", False)} <= seen


def test_gradient_release_has_every_kind_and_rate_and_modes_are_switched_in_every_kind() -> None:
    released = {(case.hyperparameters["kind"], case.hyperparameters["release"]) for case in QUICK}
    assert released >= set(product(("ortho", "free", "adam"), (1, 2, 16)))
    viewed = {case.hyperparameters["kind"] for case in STANDARD if case.hyperparameters["view"]}
    assert viewed == set(KINDS)


def test_the_exhaustive_tier_is_a_product() -> None:
    formulas, *_ = thorn.PRODUCTS
    assert {"kind", "dtype", "betas", "rectify", "target_rms", "iters", "release", "family"} <= set(formulas)
    first = {name: levels[0] for name, levels in formulas.items()}
    assert thorn.case("exhaustive", **first) in islice(thorn.exhaustive(), 10)


def test_products_in_half_precision_widen_the_budget_of_a_matrix_and_of_nothing_else() -> None:
    one = thorn.case("quick", kind="model", shapes=((12, 10), (7,)), matmul_dtype="bfloat16", betas=(0.9, 0.0))
    wrap = wrapper(FLOAT32, np.random.default_rng(0), draws=2)
    before, feed = next(iter(thorn.SUBJECT.trajectory(one)))
    exact = thorn.SUBJECT.advance(one, before, feed)
    noisy = thorn.SUBJECT.advance(one, before.wrapped(wrap), feed.wrapped(wrap))
    off = [np.max(np.abs(np.asarray(a) - b)) for a, b in zip(noisy.parameters, exact.parameters, strict=True)]
    lr = one.hyperparameters["lr"]
    assert off[0] > BFLOAT16.elementwise * lr / 100
    assert off[1] < 100 * FLOAT32.elementwise * np.max(np.abs(exact.parameters[1]))


def test_the_learning_rate_follows_its_schedule() -> None:
    one = thorn.case("quick", kind="adam", shapes=((3,),), schedule="falling", weight_decay=0.0, steps=2, betas=(0, 0))
    feeds = [Feed((np.ones(3),)) for _ in range(2)]
    snapshot = thorn.SUBJECT.begin(one, [np.zeros(3)])
    moves = []
    for feed in feeds:
        after = thorn.SUBJECT.advance(one, snapshot, feed)
        moves.append(float(after.parameters[0][0] - snapshot.parameters[0][0]))
        snapshot = after
    assert round(moves[0] / moves[1], 6) == 2
