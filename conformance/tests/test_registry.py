"""The registry: what is declared is stable, complete and paired."""

import fnmatch
import inspect
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

import trysquare
from trysquare_conformance import inputs, registry
from trysquare_conformance.case import SHORT_DTYPES, TIERS, Case
from trysquare_conformance.cases import dolphinflow
from trysquare_conformance.lanes import LANES
from trysquare_conformance.pairwise import Choice, Factors, pairwise, uncovered

STANDARD = registry.select("standard")
OF_DOLPHINFLOW = [case for case in STANDARD if case.algorithm == "dolphinflow"]
ORDINARY: Factors = {
    **dolphinflow.FORMULAS,
    "gradient_clipping": [value for values in dolphinflow.CLIPPING.values() for value in values],
    **dolphinflow.NUMBERS,
}


def choices(cases: Iterable[Case], factors: Factors) -> list[Choice]:
    """What each case has of these factors, if every level is one of theirs."""
    levels = [
        {**case.hyperparameters, **{n: getattr(case, n) for n in ("dtype", "shapes", "layout", "inputs", "steps")}}
        for case in cases
    ]
    mine = [{name: every[name] for name in factors} for every in levels]
    return [choice for choice in mine if all(choice[name] in factors[name] for name in factors)]


def test_ids_are_unique_and_fit_a_shell_and_a_glob() -> None:
    ids = [case.id for case in islice(registry.all_cases(), 20_000)]
    assert len(set(ids)) == len(ids)
    assert [name for name in ids if not re.fullmatch(r"[\w./=+-]+", name)] == []


def test_an_id_tells_every_setting() -> None:
    named: dict[str, Case] = {}
    for case in STANDARD:
        assert named.setdefault(case.id, case) == case
    assert OF_DOLPHINFLOW[0].id == (
        "dolphinflow/vector/gradient/adaptive/clip=1/decay=0.01/lr=0.01/fp32/40x24+24/contiguous/gaussian/steps=2"
    )


def test_ids_and_seeds_are_the_same_in_every_process() -> None:
    assert inputs.seed("dolphinflow", 3) == 3652295984
    assert dolphinflow.standard() == dolphinflow.standard.__wrapped__()


@pytest.mark.parametrize("lane", [None, *LANES])
def test_a_tier_holds_the_smaller_ones(lane: str | None) -> None:
    quick, standard = ({case.id for case in registry.select(tier, (), lane)} for tier in TIERS[:2])
    assert quick < standard


def test_smaller_tiers_come_first_so_that_selection_can_stop() -> None:
    for subject in registry.ALGORITHMS.values():
        tiers = [TIERS.index(case.tier) for case in islice(subject.cases(), 2_000)]
        assert tiers == sorted(tiers)


def test_selection_takes_globs() -> None:
    assert {case.dtype for case in registry.select("standard", ["dolphinflow/*/fp64/*"])} == {"float64"}
    assert registry.select("quick", ["no such case"]) == []
    assert registry.smallest_tier(["dolphinflow/*/steps=50"]) == "quick"
    assert registry.smallest_tier([OF_DOLPHINFLOW[-1].id]) == "standard"
    with pytest.raises(ValueError, match="tier='slow'"):
        registry.select("slow")


@pytest.mark.parametrize("glob", ["stablemax/*", "stab*fp32*", "st?blemax/*", "[s]tablemax/*", "*max/*", "stablemax*"])
def test_globs_leave_out_no_algorithm_that_they_match(glob: str) -> None:
    ids = [case.id for case in STANDARD]
    assert [case.id for case in registry.select("standard", [glob])] == fnmatch.filter(ids, glob) != []


def test_other_algorithms_are_not_counted_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.ALGORITHMS["thorn"], "cases", lambda: pytest.fail("counted"), raising=False)
    assert registry.select("quick", ["dolphinflow/*", STANDARD[0].id])


def test_ids_that_are_written_out_are_looked_for_no_further_than_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = registry.ALGORITHMS["dolphinflow"]
    first = list(islice((case for case in subject.cases() if case.tier == "exhaustive"), 3))

    def cases() -> Iterator[Case]:
        yield from first
        pytest.fail("counted on")

    monkeypatch.setattr(subject, "cases", cases, raising=False)
    assert registry.smallest_tier([first[2].id]) == "exhaustive"
    assert registry.select("exhaustive", [first[0].id, first[2].id]) == [first[0], first[2]]
    with pytest.raises(pytest.fail.Exception, match="counted on"):
        registry.select("exhaustive", [first[0].id, "dolphinflow/no such case"])


def test_a_lot_draws_as_many_of_each_algorithm_and_the_same_again() -> None:
    everything = registry.select("standard", lane="eager-cpu")
    lot = registry.Lot(40, seed=3)
    drawn = registry.select("standard", lane="eager-cpu", lot=lot)
    assert drawn == registry.select("standard", lane="eager-cpu", lot=lot)
    assert drawn != registry.select("standard", lane="eager-cpu", lot=registry.Lot(40, seed=4))
    assert drawn == [case for case in everything if case in set(drawn)]
    counts = Counter(case.algorithm for case in drawn)
    assert counts == {name: min(40, n) for name, n in Counter(case.algorithm for case in everything).items()}


def test_a_lot_draws_each_case_alike() -> None:
    cases = registry.select("quick", ["stablemax/*"])[:10]
    drawn = Counter(case.id for seed in range(2000) for case in registry.Lot(3, seed).draw(cases))
    expected = 2000 * 3 / 10
    deviation = math.sqrt(2000 * 0.3 * 0.7)
    assert max(abs(drawn[case.id] - expected) for case in cases) < 5 * deviation


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_are_all_in_their_order_and_even(parts: int) -> None:
    found = [registry.part(STANDARD, index, parts) for index in range(parts)]
    assert [case.id for one in found for case in one] == [case.id for case in STANDARD]
    even = len(STANDARD) / parts
    assert all(abs(len(one) - even) <= 2 * even / registry.NEAR + 2 for one in found)


def test_a_part_ends_where_an_algorithm_does_if_that_is_near() -> None:
    of = dict(zip("abc", ("dolphinflow", "stablemax", "thorn"), strict=True))
    items = [next(case for case in STANDARD if case.algorithm == of[name]) for name in "a" * 53 + "b" * 20 + "c" * 27]
    first, second = (registry.part(items, index, 2) for index in range(2))
    assert ({case.algorithm for case in first}, len(first)) == ({"dolphinflow"}, 53)
    assert len(second) == 47
    assert [len(registry.part(items[:90], index, 2)) for index in range(2)] == [45, 45]


def test_every_constructor_argument_is_exercised() -> None:
    arguments = set(inspect.signature(trysquare.DolphinFlow).parameters) - {"params", "backend"}
    values: dict[str, set[Any]] = {name: {case.hyperparameters[name] for case in OF_DOLPHINFLOW} for name in arguments}
    assert {name for name, seen in values.items() if len(seen) < 2} == set()
    assert {"eager", "compiled"} <= {lane.backend for lane in LANES.values()}


def test_every_constructor_argument_of_the_8bit_version_is_exercised() -> None:
    arguments = set(inspect.signature(trysquare.DolphinFlow8bit).parameters) - {"params", "backend"}
    cases = [case for case in STANDARD if case.algorithm == "dolphinflow8bit"]
    values: dict[str, set[Any]] = {name: {case.hyperparameters[name] for case in cases} for name in arguments}
    assert {name for name, seen in values.items() if len(seen) < 2} == set()
    assert {case.inputs for case in cases} == set(inputs.KINDS)
    assert {case.layout for case in cases} == set(inputs.LAYOUTS)


def test_a_lane_runs_the_algorithms_that_have_its_backend() -> None:
    chosen = {case.algorithm for case in registry.select("quick", (), "bitsandbytes-cpu")}
    assert chosen == {"blockwise8bit", "dolphinflow8bit"}
    everything = {case.algorithm for case in registry.select("quick", (), "eager-cpu")}
    assert everything == set(registry.ALGORITHMS)


def test_every_pair_of_levels_occurs() -> None:
    for factors in (ORDINARY, dolphinflow.HOSTILE):
        assert uncovered(factors, choices(OF_DOLPHINFLOW, factors), dolphinflow.allowed) == set()


def test_many_steps_meet_every_level() -> None:
    factors = {**ORDINARY, "steps": (dolphinflow.MANY_STEPS,)}
    missing = uncovered(factors, choices(OF_DOLPHINFLOW, factors), dolphinflow.allowed)
    assert [pair for pair in missing if "steps" in dict(pair)] == []


def test_the_standard_tier_has_every_input_layout_dtype_and_kind_of_shape() -> None:
    assert {case.inputs for case in OF_DOLPHINFLOW} == set(inputs.KINDS)
    assert {case.layout for case in OF_DOLPHINFLOW} == set(inputs.LAYOUTS)
    assert {case.dtype for case in OF_DOLPHINFLOW} == set(SHORT_DTYPES)
    shapes = {shape for case in OF_DOLPHINFLOW for shape in case.shapes}
    assert {len(shape) for shape in shapes} == {0, 1, 2, 3, 4, 5}
    assert any(0 in shape for shape in shapes)
    assert any(len(case.shapes) > 3 for case in OF_DOLPHINFLOW)


def test_the_exhaustive_tier_is_a_product() -> None:
    rules, hostile = dolphinflow.PRODUCTS
    listed = {"ortho_mode", "project", "adaptive_lr", "gradient_clipping", "weight_decay", "bias_correction"}
    assert listed | {"dtype", "shapes", "layout", "steps"} == set(rules)
    assert listed | {"dtype", "inputs", "nonfinite"} <= set(hostile)
    assert rules["steps"] == (1, 2, 50)
    last = {"ortho_mode": None, "layout": "expanded", "steps": 1}
    expected = dolphinflow.case("exhaustive", **{name: last.get(name, levels[0]) for name, levels in rules.items()})
    assert expected in islice(dolphinflow.exhaustive(), 100_000)


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 4, 5), (2, 3, 2, 2, 2), (1, 5), (0, 3)])
def test_a_layout_keeps_the_values_and_is_one(layout: str, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(float(np.prod(shape))).reshape(shape)
    made = inputs.lay_out(tensor, layout)
    expected = tensor[:1].expand(shape) if layout == "expanded" else tensor
    assert torch.equal(made, expected)
    changed = made.stride() != tensor.stride() or made.storage_offset() > 0
    assert changed == (layout != "contiguous" and inputs.fits(layout, shape) and shape not in {(1, 5), (0, 3)}) or (
        shape in {(1, 5), (0, 3)}
    )


@pytest.mark.parametrize("name", inputs.KINDS)
def test_a_kind_of_input_says_why_and_is_what_it_says(name: str) -> None:
    kind = inputs.KINDS[name]
    assert len(kind.reason) > 10
    for dtype in kind.dtypes:
        for shape in ((6, 5), (6,), (), (0, 3), (4, 3, 2, 2)):
            weights = kind.weights(inputs.Draw(np.random.default_rng(0), shape, dtype))
            gradient = kind.gradient(inputs.Draw(np.random.default_rng(1), shape, dtype, weights))
            assert weights.shape == gradient.shape == shape
            assert np.isfinite(gradient).all() == (kind.finite or gradient.size == 0)


def test_pairs_are_covered_with_few_combinations_and_respect_what_is_allowed() -> None:
    factors: Factors = {"a": range(4), "b": range(4), "c": range(3), "d": (False, True)}

    def allowed(choice: Choice) -> bool:
        return not (choice.get("a") == 1 and choice.get("d"))

    chosen = pairwise(factors, allowed)
    assert uncovered(factors, chosen, allowed) == set()
    assert all(map(allowed, chosen))
    assert 16 <= len(chosen) <= 20
    around = pairwise(factors, around="c")
    assert len(around) == 12
    assert not [pair for pair in uncovered(factors, around) if "c" in dict(pair)]
