"""Blockwise 8-bit numbers: the maps are bitsandbytes', codes are the nearest, and blocks know nothing of each other."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trysquare_conformance.budget import Array, rounding_error
from trysquare_reference import blockwise8bit as page

MAPS = {True: page.dynamic_map(signed=True), False: page.dynamic_map(signed=False)}
signs = pytest.mark.parametrize("signed", [True, False])
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, size: int, signed: bool, decades: float = 9.0) -> Array:
    """Magnitudes over many decades, in every code's reach."""
    rng = np.random.default_rng(seed)
    values = 10.0 ** rng.uniform(-decades, 0, size)
    return values * rng.choice([-1.0, 1.0], size) if signed else values


def by_search(s: Array, qmap: Array) -> Array:
    """The nearest entry by looking at all of them; the first of several."""
    return np.argmin(np.abs(s[:, np.newaxis] - qmap), axis=1)


@signs
def test_a_map_ascends_through_256_float32_values(signed: bool) -> None:
    q = MAPS[signed]
    assert q.shape == (256,)
    assert np.all(np.diff(q) > 0)
    assert np.array_equal(q, q.astype(np.float32))
    assert q[-1] == 1
    with pytest.raises(ValueError, match="read-only"):
        q[0] = 0


def test_the_facts_of_the_maps() -> None:
    signed, unsigned = MAPS[True], MAPS[False]
    assert (signed[127], unsigned[0]) == (0, 0)
    assert np.float32(signed[0]) == np.float32(-0.99296874)
    assert np.float32(signed[128]) == np.float32(5.5000004e-07)
    assert np.float32(unsigned[1]) == np.float32(3.2500003e-07)
    assert np.array_equal(signed[:127], -signed[128:255][::-1])


def test_torch_makes_the_same_edges() -> None:
    """The maps of bitsandbytes are made with torch's linspace, which NumPy's differs from in the last place."""
    torch = pytest.importorskip("torch")
    for i in range(page.DECADES):
        for n in (2**i, 2 ** (i + 1)):
            edges = torch.linspace(0.1, 1, n + 1)
            values = (10 ** (i - 6)) * ((edges[:-1] + edges[1:]) / 2.0)
            made = page._decade(i, n)
            steps = made.view(np.int32).astype(int) - values.numpy().view(np.int32)
            assert np.abs(steps).max() <= 1


@signs
@given(seed=seeds)
def test_a_code_is_the_nearest(signed: bool, seed: int) -> None:
    s = draw(seed, 300, signed)
    assert np.array_equal(page.nearest(s, MAPS[signed]), by_search(s, MAPS[signed]))


@signs
def test_every_value_keeps_its_code_and_a_tie_goes_to_the_lower(signed: bool) -> None:
    q = MAPS[signed]
    assert np.array_equal(page.nearest(q, q), np.arange(256))
    between = page.midpoints(q)
    assert np.array_equal(page.nearest(between, q), np.arange(255))
    assert np.array_equal(page.nearest(np.nextafter(between, 2), q), np.arange(1, 256))


@signs
@given(seed=seeds, size=st.integers(1, 700), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_what_comes_back_is_within_the_bound(signed: bool, seed: int, size: int, scale: float) -> None:
    x = draw(seed, size, signed) * scale
    codes, absmax = page.quantize(x, MAPS[signed])
    back = page.dequantize(codes, absmax, MAPS[signed])
    assert np.all(np.abs(back - x) <= page.error_bound(codes, absmax, MAPS[signed]) + rounding_error(x, 4))
    again, scales = page.quantize(back, MAPS[signed])
    kept = absmax == scales
    same = page.unblocked(np.broadcast_to(kept[:, np.newaxis], (kept.size, page.BLOCK)), codes.shape)
    assert np.all((again == codes) | ~same)


@signs
@given(seed=seeds)
def test_the_interval_of_a_code_is_where_it_is_taken(signed: bool, seed: int) -> None:
    s = np.concatenate([draw(seed, 200, signed), [0.0, 1.0]])
    codes, _ = page.quantize(s, MAPS[signed])
    low, high = page.interval(codes, MAPS[signed])
    assert np.all((low <= s) & (s <= high))


@given(seed=seeds, size=st.integers(257, 1500))
def test_blocks_know_nothing_of_each_other(seed: int, size: int) -> None:
    x = draw(seed, size, signed=True) * 10.0 ** np.random.default_rng(seed).integers(-20, 20, size)
    codes, absmax = page.quantize(x, MAPS[True])
    for block, start in enumerate(range(0, size, page.BLOCK)):
        part, scale = page.quantize(x[start : start + page.BLOCK], MAPS[True])
        assert np.array_equal(codes[start : start + page.BLOCK], part)
        assert absmax[block] == scale[0]


def test_blocks_run_over_the_rows() -> None:
    x = draw(0, 1200, signed=True).reshape(3, 4, 100)
    codes, absmax = page.quantize(x, MAPS[True])
    flat, scales = page.quantize(x.reshape(-1), MAPS[True])
    assert codes.shape == x.shape
    assert np.array_equal(codes.reshape(-1), flat)
    assert np.array_equal(absmax, scales)


@signs
def test_zeros_have_the_code_of_zero_and_come_back(signed: bool) -> None:
    codes, absmax = page.quantize(np.zeros(300), MAPS[signed])
    assert set(codes.tolist()) == {127 if signed else 0}
    assert absmax.tolist() == [0, 0]
    for held in (codes, np.arange(300) % 256):
        assert not page.dequantize(held.astype(np.uint8), absmax, MAPS[signed]).any()


def test_a_positive_value_never_takes_the_code_of_zero() -> None:
    x = np.array([0.0, 5e-324, 1e-30, 1e-7, 1.0])
    assert page.quantize(x, MAPS[False])[0].tolist() == [0, 1, 1, 1, 255]
    assert page.quantize(x, MAPS[True])[0].tolist() == [127, 127, 127, 127, 255]


@signs
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_block_with_a_value_that_is_not_finite_shows_it_and_no_other_does(signed: bool, value: float) -> None:
    x = draw(0, 600, signed)
    x[300] = value
    codes, absmax = page.quantize(x, MAPS[signed])
    assert set(codes[256:512].tolist()) == {127 if signed else 0}
    back = page.dequantize(codes, absmax, MAPS[signed])
    assert np.isnan(back[256:512]).all()
    assert np.isfinite(back[:256]).all()
    assert np.isfinite(back[512:]).all()


@pytest.mark.parametrize("scale", [1e-310, 1e-30, 1e30, 1e300])
def test_the_scale_of_a_block_changes_no_code(scale: float) -> None:
    x = np.array([1.0, -0.5, 0.25, 0.0]) * scale
    assert page.quantize(x, MAPS[True])[0].tolist() == [255, *page.nearest(np.array([-0.5, 0.25, 0.0]), MAPS[True])]


def test_an_empty_tensor_has_no_block() -> None:
    codes, absmax = page.quantize(np.zeros((0, 3)), MAPS[True])
    assert (codes.shape, absmax.shape) == ((0, 3), (0,))
    assert page.dequantize(codes, absmax, MAPS[True]).shape == (0, 3)
