"""Each method on one layer: what goes, by loops and by brute force."""

from functools import partial
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pumice.passes.prune_rows import prune_rows, saliency
from pumice.passes.prune_spec import OBC, Magnitude, NearZero, SparseGPT, Wanda
from pumice.passes.statistics import Moments, output_error
from pumice.patterns import BLOCKS, Pattern

PATTERNS = ["unstructured", *BLOCKS, "2:4", "1:4", "4:8"]


def layer(n, taps, c, groups=1, seed=0):
    """A weight, and moments of correlated inputs, of each group its own."""
    draw = np.random.default_rng(seed)
    k = taps * c
    inputs = draw.standard_normal((groups, 4 * k, k)) @ draw.standard_normal((groups, k, k))
    gram = inputs.transpose(0, 2, 1) @ inputs / (4 * k)
    return draw.standard_normal((n, taps, c)).astype(np.float32), Moments(gram, inputs.mean(1), 4 * k)


def units(rows, pattern):
    """The values of every block, by loops."""
    n, taps, c = rows.shape
    return [
        rows[i : i + pattern.height, t, j : j + pattern.width]
        for i in range(0, n, pattern.height)
        for t in range(taps)
        for j in range(0, c, pattern.width)
    ]


SURGEONS = (SparseGPT, partial(SparseGPT, refits=8), OBC)


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("surgeon", SURGEONS)
@settings(max_examples=6, deadline=None)
@given(n=st.integers(1, 9), taps=st.sampled_from([1, 4]), c=st.integers(1, 11), amount=st.floats(0, 1))
def test_a_surgeon_keeps_to_the_pattern_and_the_amount(text, surgeon, n, taps, c, amount):
    pattern = Pattern.parse(text)
    rows, moments = layer(n, taps, c)
    spec = surgeon(pattern, amount)
    after = prune_rows(rows, spec, spec.amount, moments)
    assert after.dtype == np.float32
    if pattern.group is None:
        gone = sum(not unit.any() for unit in units(after, pattern))
        assert gone == round(amount * len(units(rows, pattern)))
        assert all(not unit.any() or unit.all() for unit in units(after, pattern))
    else:
        kept, m = pattern.group
        for row in after.reshape(-1, c):
            assert all(np.count_nonzero(row[j : j + m]) == min(kept, len(row[j : j + m])) for j in range(0, c, m))


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("surgeon", SURGEONS)
def test_what_is_zero_stays_zero(text, surgeon):
    rows, moments = layer(8, 2, 8)
    was_zero = np.random.default_rng(1).random(rows.shape) < 0.4
    rows[was_zero] = 0
    spec = surgeon(Pattern.parse(text), 0.5)
    after = prune_rows(rows, spec, spec.amount, moments)
    assert (after[was_zero] == 0).all()


@pytest.mark.parametrize("text", PATTERNS)
def test_each_method_loses_less_than_the_one_before(text):
    """Magnitude, wanda, SparseGPT, SparseGPT with refits: in this order on correlated inputs of uneven size."""
    rows, moments = layer(32, 1, 32, seed=3)
    size = np.exp(np.random.default_rng(4).standard_normal(32))
    moments = Moments(moments.gram * size * size[:, None], moments.mean * size, moments.count)
    pattern = Pattern.parse(text)
    specs = [Magnitude(pattern, 0.5), Wanda(pattern, 0.5), SparseGPT(pattern, 0.5), SparseGPT(pattern, 0.5, refits=30)]
    errors = [output_error(rows, prune_rows(rows, spec, spec.amount, moments), moments) for spec in specs]
    assert errors == sorted(errors, reverse=True)


def test_wanda_takes_of_each_row_the_smallest_products():
    rows, moments = layer(5, 2, 6)
    after = prune_rows(rows, Wanda(Pattern(), 0.5), 0.5, moments)
    norms = np.sqrt(np.diagonal(moments.gram[0])).reshape(2, 6)
    for before, row in zip(rows, after, strict=True):
        scores = np.abs(before) * norms
        assert np.count_nonzero(row) == 6
        assert scores[row == 0].max() <= scores[row != 0].min()
        assert (row[row != 0] == before[row != 0]).all()


def test_every_group_is_pruned_by_its_own_inputs():
    rows, moments = layer(6, 1, 4, groups=3)
    whole = prune_rows(rows, SparseGPT(Pattern(), 0.5), 0.5, moments)
    for i in range(3):
        alone = Moments(moments.gram[i : i + 1], moments.mean[i : i + 1], moments.count)
        part = prune_rows(rows[2 * i : 2 * i + 2], SparseGPT(Pattern(), 0.5), 0.5, alone)
        np.testing.assert_array_equal(whole[2 * i : 2 * i + 2], part)


def test_refits_come_near_the_best_of_all_masks():
    """One row of four blocks of which two go: all six choices tried, each with its least squares weights."""
    best = reached = one_pass = 0.0
    for seed in range(10):
        rows, moments = layer(1, 1, 16, seed=seed)
        gram = moments.gram[0]
        errors = []
        for kept in combinations(range(4), 2):
            left = [4 * block + i for block in kept for i in range(4)]
            weights = np.zeros(16)
            weights[left] = np.linalg.solve(gram[np.ix_(left, left)], gram[left] @ rows[0, 0])
            errors.append(output_error(rows, weights.reshape(rows.shape), moments))
        best += min(errors)
        found = [prune_rows(rows, SparseGPT(Pattern(1, 4), 0.5, refits=n, damping=1e-6), 0.5, moments) for n in (30, 0)]
        reached += output_error(rows, found[0], moments)
        one_pass += output_error(rows, found[1], moments)
    assert best * (1 - 1e-3) <= reached <= 1.5 * best
    assert reached < one_pass


@pytest.mark.parametrize("text", ["unstructured", *BLOCKS])
@given(seed=st.integers(0, 20), relative=st.booleans())
@settings(max_examples=10, deadline=None)
def test_near_zero_takes_what_is_no_larger_than_the_threshold(text, seed, relative):
    pattern = Pattern.parse(text)
    rows, _ = layer(7, 2, 6, seed=seed)
    threshold = 0.8 * (float(np.sqrt(np.mean(rows.astype(np.float64) ** 2))) if relative else 1.0)
    after = prune_rows(rows, NearZero(pattern, 0.8, relative), 0.0)
    for before, unit in zip(units(rows, pattern), units(after, pattern), strict=True):
        assert np.array_equal(unit, 0 * before if np.abs(before).max() <= threshold else before)


def test_saliency_is_comparable_between_layers():
    rows, moments = layer(3, 1, 4)
    size = np.sqrt(np.diagonal(moments.gram[0]))
    np.testing.assert_allclose(saliency(rows, Wanda(Pattern(), 0.5), moments)[:, 0], np.abs(rows[:, 0]) * size)
    squared = saliency(rows, SparseGPT(Pattern(), 0.5), moments)[:, 0]
    np.testing.assert_allclose(squared, np.square(np.abs(rows[:, 0]) * size))
