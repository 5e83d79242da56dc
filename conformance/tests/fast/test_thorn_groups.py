"""Groups say themselves what they are. What they cannot be is refused whole, with what to do instead.

Bad values of every hyperparameter are in `test_bad_input`, bad tensors in `test_bad_tensors`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trysquare import THORN
from trysquare_conformance.behaviour import (
    all_parameters,
    bits,
    give_gradients,
    held,
    nothing_changes,
    parameters,
    progress,
    run,
)
from trysquare_conformance.behaviour_thorn import KINDS, groups, thorn

TRIPLES = [(3.4445, -4.7750, 2.0315)] * 5


def matrix() -> list[nn.Parameter]:
    return parameters([(4, 3)])


def still_works(optimizer: THORN) -> None:
    before = [bits(p) for p in all_parameters(optimizer) if p.numel()]
    run(optimizer, 20)  # with `rectify` nothing moves at first
    assert all(
        old != bits(p) for old, p in zip(before, [p for p in all_parameters(optimizer) if p.numel()], strict=True)
    )


# Groups that do not say what they are


@pytest.mark.parametrize(
    "params",
    [
        lambda p: p,
        lambda p: [{"params": p}],
        lambda p: [{"params": p, "orthogonalize": True}, {"params": parameters([(3,)])}],
        lambda p: [("weight", p[0])],
    ],
    ids=["parameters", "group", "second group", "named"],
)
def test_a_group_must_say_whether_it_is_orthogonalized(params: Callable[[list[Tensor]], Any]) -> None:
    own = matrix()
    before = held(own)
    with pytest.raises(
        ValueError, match=r"group \d does not say whether it is orthogonalized: give it the key"
    ) as error:
        THORN(params(own))
    assert "'orthogonalize' with True or False, or give THORN the model itself" in str(error.value)
    assert held(own) == before


def test_a_group_without_the_key_cannot_be_added() -> None:
    optimizer = thorn()
    with nothing_changes(optimizer), pytest.raises(ValueError, match="group 6 does not say"):
        optimizer.add_param_group({"params": matrix()})
    still_works(optimizer)


def test_orthogonalize_is_no_argument_of_the_constructor() -> None:
    with pytest.raises(TypeError, match="orthogonalize"):
        THORN([{"params": matrix(), "orthogonalize": True}], orthogonalize=True)


@pytest.mark.parametrize("key", ["exclude", "nonfinite", "backend", "workspace_bytes", "momentum", "differentiable"])
def test_an_unknown_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"group 0: unknown key '{key}'"):
        THORN([{"params": matrix(), "orthogonalize": True, key: ()}])


@pytest.mark.parametrize("name", ["train_mode", "averaged_with", "fingerprints", "update_rate"])
def test_what_a_group_carries_is_no_setting(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown key '{name}'"):
        THORN([{"params": matrix(), "orthogonalize": True, name: 1}])


# Shapes


@pytest.mark.parametrize("shape", [(), (3,), (0,)])
def test_what_is_no_matrix_cannot_be_orthogonalized(shape: tuple[int, ...]) -> None:
    optimizer, group = thorn(), {"params": [("bias", *parameters([shape]))], "orthogonalize": True}
    says = (
        rf"group 6: bias has shape \({', '.join(map(str, shape))},?\), but to be orthogonalized it needs 2 dimensions"
    )
    with nothing_changes(optimizer), pytest.raises(ValueError, match=says):
        optimizer.add_param_group(group)
    with pytest.raises(ValueError, match=says.replace("group 6", "group 0")):
        THORN([group])
    still_works(optimizer)


def test_what_is_no_batch_of_matrices_cannot_be_one() -> None:
    optimizer = thorn()
    with nothing_changes(optimizer), pytest.raises(ValueError, match=r"in a batch it needs 3 dimensions: put it into"):
        optimizer.add_param_group({"params": matrix(), "orthogonalize": True, "batched": True})
    with nothing_changes(optimizer), pytest.raises(ValueError, match=r"batched=True says how matrices lie, but"):
        optimizer.add_param_group({"params": parameters([(2, 4, 3)]), "orthogonalize": False, "batched": True})


def test_edits_that_make_a_group_impossible_are_refused_by_the_next_step() -> None:
    optimizer = thorn(("matrices", "averaged"))
    run(optimizer, 1)
    for index, edit in ((0, {"batched": True}), (1, {"orthogonalize": True}), (0, {"coefficients": TRIPLES[:2]})):
        group = optimizer.param_groups[index]
        good = {name: group[name] for name in edit}
        group.update(edit)
        with nothing_changes(optimizer), pytest.raises(ValueError, match=f"group {index}"):
            optimizer.step()
        group.update(good)
    still_works(optimizer)


def test_a_batch_is_its_slices() -> None:
    whole = THORN([{"params": parameters([(3, 5, 4)]), "orthogonalize": True, "batched": True}], lr=0.01)
    (experts,) = all_parameters(whole)
    parts = [nn.Parameter(slice_.clone()) for slice_ in experts.detach()]
    apart = THORN([{"params": parts, "orthogonalize": True}], lr=0.01, workspace_bytes=1 << 20)
    for seed in range(3):
        run(whole, 1, first=seed)
        for part, gradient in zip(parts, parameters([(3, 5, 4)], seed=seed + 1)[0].grad, strict=True):
            part.grad = gradient.clone()
        apart.step()
    assert bits(experts) == bits(torch.stack([part.detach() for part in parts]))


def test_a_flattened_convolution_is_its_matrix() -> None:
    kernel, flat = (
        THORN([{"params": parameters([s]), "orthogonalize": True}], lr=0.01) for s in ((4, 3, 2, 2), (4, 12))
    )
    (p,), (q,) = map(all_parameters, (kernel, flat))
    q.data.copy_(p.data.view(4, 12))
    for seed in range(3):
        run(kernel, 1, first=seed)
        q.grad = parameters([(4, 3, 2, 2)], seed=seed + 1)[0].grad.view(4, 12)
        flat.step()
    assert bits(p.view(4, 12)) == bits(q)


# Settings that do not fit together


@pytest.mark.parametrize("count", [1, 4, 6])
def test_there_is_a_triple_for_each_iteration(count: int) -> None:
    says = f"group 0: coefficients has {count} triples, iters=5: one for each"
    table = (TRIPLES * 2)[:count]
    with pytest.raises(ValueError, match=says):
        THORN([{"params": matrix(), "orthogonalize": True}], coefficients=table)
    with pytest.raises(ValueError, match=says):
        THORN([{"params": matrix(), "orthogonalize": True, "coefficients": table}])
    still_works(THORN([{"params": matrix(), "orthogonalize": True}], coefficients=table, iters=count))


def test_exclude_needs_names() -> None:
    with pytest.raises(ValueError, match=r"exclude=\('output',\) needs a model: groups say themselves"):
        THORN(groups(), exclude=("output",))
    still_works(THORN(groups(), exclude=()))


@pytest.mark.parametrize("exclude", ["output", b"output", None, 5, {"output"}, ("output", 3), [None]], ids=repr)
def test_exclude_is_a_sequence_of_patterns(exclude: Any) -> None:
    with pytest.raises(TypeError, match=r"exclude=.* must be a sequence of patterns such as"):
        THORN(nn.Linear(3, 2), exclude=exclude)


@pytest.mark.parametrize("beta2", [0.1, 0.5, 0.6])
def test_a_rectification_that_is_never_active_is_warned_of(beta2: float) -> None:
    """RAdam's ρ∞ is at most 4: no parameter would ever move."""
    with pytest.warns(UserWarning, match=rf"group 0: rectify=True with beta2={beta2} never lets a parameter move"):
        optimizer = THORN([{"params": matrix(), "orthogonalize": True}], betas=(0.9, beta2), rectify=True)
    before = bits(all_parameters(optimizer)[0])
    run(optimizer, 20)
    assert bits(all_parameters(optimizer)[0]) == before


@pytest.mark.parametrize(("beta2", "rectify"), [(0.0, True), (0.61, True), (0.5, False)])
def test_no_other_rectification_is_warned_of(beta2: float, rectify: bool) -> None:
    still_works(THORN([{"params": matrix(), "orthogonalize": True}], betas=(0.9, beta2), rectify=rectify))


# Groups that fit


def test_groups_have_settings_of_their_own() -> None:
    """Each as an optimizer of its own would."""
    together = thorn()
    alone = [thorn((kind,)) for kind in KINDS]
    for single, group in zip(alone, together.param_groups, strict=True):
        for p, q in zip(all_parameters(single), group["params"], strict=True):
            p.data.copy_(q.data)
    for seed in range(3):
        give_gradients(all_parameters(together), seed=seed)
        for single, group in zip(alone, together.param_groups, strict=True):
            for p, q in zip(all_parameters(single), group["params"], strict=True):
                p.grad = q.grad.clone()
            single.step()
        together.step()
    assert progress(together)["parameters"] == [value for o in alone for value in progress(o)["parameters"]]
    assert progress(together)["state"] == [value for o in alone for value in progress(o)["state"]]


def test_a_group_can_be_added_after_steps() -> None:
    optimizer = thorn(("matrices",))
    run(optimizer, 2)
    optimizer.add_param_group({"params": parameters([(3,)]), "orthogonalize": False, "name": "late", "initial_lr": 1.0})
    run(optimizer, 1)
    assert [optimizer.state[p]["step"].item() for p in all_parameters(optimizer)] == [3, 3, 3, 3, 1]


def test_no_argument_is_written_to() -> None:
    given = groups()
    kept = [{**group, "params": list(group["params"])} for group in given]
    THORN(given)
    assert [{**group, "params": [id(p) for p in group["params"]]} for group in given] == [
        {**group, "params": [id(p) for p in group["params"]]} for group in kept
    ]
