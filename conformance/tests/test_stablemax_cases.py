"""The cases of StableMax: complete, paired, and fed with what their kinds promise; and its planted faults."""

import inspect
from typing import Any

import numpy as np
import pytest

import trysquare
from trysquare_conformance import faults, inputs, registry
from trysquare_conformance.case import SHORT_DTYPES, Case
from trysquare_conformance.cases import stablemax
from trysquare_conformance.inputs import Draw
from trysquare_conformance.logits import IGNORE_INDEX, LOGITS, draw
from trysquare_conformance.pairwise import Choice, Factors, uncovered

STANDARD = [case for case in registry.select("standard") if case.algorithm == "stablemax"]
OF_LOSS = [case for case in STANDARD if case.hyperparameters["function"] == "cross-entropy"]


def choices(cases: list[Case], factors: Factors) -> list[Choice]:
    """What each case has of these factors, if every level is one of theirs."""
    levels = [
        {**c.hyperparameters, "dtype": c.dtype, "layout": c.layout, "inputs": c.inputs, "shape": c.shapes[0]}
        for c in cases
    ]
    mine = [{name: every[name] for name in factors} for every in levels]
    return [choice for choice in mine if all(choice[name] in factors[name] for name in factors)]


def test_an_id_tells_every_setting() -> None:
    named: dict[str, Case] = {}
    for case in STANDARD:
        assert named.setdefault(case.id, case) == case
    assert STANDARD[0].id == "stablemax/cross-entropy/index/mean/fp32/12x10/contiguous/gaussian"


@pytest.mark.parametrize("factors", [{**stablemax.FORMULAS, **stablemax.NUMBERS}, stablemax.VALUES])
def test_every_pair_of_levels_occurs(factors: Factors) -> None:
    assert uncovered(factors, choices(STANDARD, factors), stablemax.allowed) == set()


def test_every_argument_is_exercised() -> None:
    arguments = set(inspect.signature(trysquare.stablemax_cross_entropy).parameters) - {"input", "target", "backend"}
    settings = {"ignored" if name == "ignore_index" else name for name in arguments}
    seen: dict[str, set[Any]] = {name: {case.hyperparameters[name] for case in OF_LOSS} for name in settings}
    assert {name for name, values in seen.items() if len(values) < 2} == set()


def test_the_standard_tier_has_every_input_layout_dtype_and_kind_of_shape() -> None:
    assert {case.inputs for case in OF_LOSS} == set(LOGITS)
    assert {case.layout for case in OF_LOSS} == set(inputs.LAYOUTS)
    assert {case.dtype for case in OF_LOSS} == set(SHORT_DTYPES)
    assert {case.shapes[0] for case in OF_LOSS} == set(stablemax.SHAPES)
    assert {case.hyperparameters["function"] for case in STANDARD} == {"cross-entropy", "stablemax", "log-stablemax"}


@pytest.mark.parametrize("name", LOGITS)
def test_a_kind_of_logits_says_why_and_fits_its_formats(name: str) -> None:
    kind = LOGITS[name]
    assert len(kind.reason) > 10
    for dtype in kind.dtypes:
        for shape in ((3, 5), (1, 1), (2, 4, 3), (0, 5)):
            logits = kind.make(Draw(np.random.default_rng(0), shape, dtype))
            target = kind.target(np.random.default_rng(1), logits)
            assert logits.shape == shape
            assert target.shape == (shape[0], *shape[2:])
            assert ((target >= 0) & (target < shape[1])).all()


@pytest.mark.parametrize("ignored", IGNORE_INDEX)
def test_what_a_case_ignores_is_in_its_target(ignored: str) -> None:
    target = draw(stablemax.case("quick", ignored=ignored, shape=(40, 5))).target
    share = np.mean(target == IGNORE_INDEX[ignored])
    low, high = {"none": (0, 0), "some": (0.3, 0.4), "all": (1, 1), "class": (0.05, 0.5)}[ignored]
    assert low <= share <= high


def test_a_case_is_the_same_every_time() -> None:
    one = stablemax.case("quick", target="probabilities", weight="some-zero")
    first, second = draw(one), draw(one)
    for a, b in ((first.x, second.x), (first.target, second.target), (first.weight, second.weight)):
        np.testing.assert_array_equal(a, b)


def test_there_are_faults_of_every_kind() -> None:
    mine = [fault for fault in faults.all_faults() if fault.algorithm == "stablemax"]
    assert len(mine) >= 30
    assert len({fault.id for fault in mine}) == len(mine)
    assert all(fault.what for fault in mine)
