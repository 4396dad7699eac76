"""On matrices small enough that all choices can be tried."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pumice.passes.brain_surgeon import alternate, damped, inverse_factor, refit, round_columns, sparsegpt


def problem(n, k, seed):
    """Weights, and second moments of correlated inputs."""
    draw = np.random.default_rng(seed)
    inputs = draw.standard_normal((50, k)) @ draw.standard_normal((k, k))
    return draw.standard_normal((n, k)), inputs.T @ inputs / 50 + 1e-3 * np.eye(k)


def loss(before, after, gram):
    difference = before - after
    return float(np.trace(difference @ gram @ difference.T))


def best_weights(row, gram, zero):
    """The minimum by the normal equations of what is left."""
    left = [j for j in range(len(row)) if not zero[j]]
    result = np.zeros(len(row))
    if left:
        result[left] = np.linalg.inv(gram[np.ix_(left, left)]) @ gram[left] @ row
    return result


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_the_factor_is_that_of_the_inverse(n, k, seed):
    _, gram = problem(n, k, seed)
    factor = inverse_factor(gram)
    assert np.array_equal(factor, np.triu(factor))
    for j in range(k):  # also of what is left once the columns before are fixed
        np.testing.assert_allclose(factor[j:, j:].T @ factor[j:, j:] @ gram[j:, j:], np.eye(k - j), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 99), st.floats(0, 1))
def test_refit_is_the_least_squares_solution(n, k, seed, share):
    weight, gram = problem(n, k, seed)
    zero = np.random.default_rng(seed).random((n, k)) < share
    found = refit(weight, gram, zero)
    expected = np.stack([best_weights(row, gram, mask) for row, mask in zip(weight, zero, strict=True)])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert (found[zero] == 0).all()


def test_one_column_goes_as_the_formula_says():
    """w_j goes: the others move by -w_j / inverse_jj times row j of the inverse, and the loss is w_j^2 / inverse_jj."""
    weight, gram = problem(1, 6, 0)
    inverse = np.linalg.inv(gram)
    found = sparsegpt(weight, gram, [slice(j, j + 1) for j in range(6)], lambda w, u, units: np.eye(1, 6, 0, bool))
    np.testing.assert_allclose(found[0], weight[0] - weight[0, 0] / inverse[0, 0] * inverse[0], atol=1e-9)
    assert loss(weight, found, gram) == pytest.approx(weight[0, 0] ** 2 / inverse[0, 0])


def test_with_all_zeros_in_front_one_pass_is_the_least_squares_solution():
    """What is behind a column can make up for it; where all that stays is behind, nothing is lost."""
    weight, gram = problem(3, 8, 1)
    zero = np.zeros((3, 8), bool)
    zero[:, :5] = True
    found = sparsegpt(weight, gram, [slice(j, j + 1) for j in range(8)], lambda w, u, units: zero)
    np.testing.assert_allclose(found, refit(weight, gram, zero), atol=1e-8)


def test_alternating_directions_come_near_the_best_choice():
    """Of all ways to take 3 of 6 columns, for 20 rows: far better than by size times input, and near the best."""
    best = reached = plain = 0.0

    def smallest(scores, progress):
        order = np.argsort(scores[0])
        return np.isin(np.arange(6), order[: round(3 * progress)])[None]

    for seed in range(20):
        weight, gram = problem(1, 6, seed)
        zeros = [np.isin(np.arange(6), gone)[None] for gone in combinations(range(6), 3)]
        best += min(loss(weight, refit(weight, gram, zero), gram) for zero in zeros)
        found = alternate(weight, gram, smallest, 60)
        assert found.sum() == 3
        reached += loss(weight, refit(weight, gram, found), gram)
        by_size = smallest(np.square(weight) * np.diagonal(gram), 1.0)
        plain += loss(weight, refit(weight, gram, by_size), gram)
    assert best <= reached <= 1.5 * best
    assert plain > 1.2 * reached


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 99))
def test_rounding_keeps_zeros_and_its_range(n, k, seed):
    weight, gram = problem(n, k, seed)
    weight[np.random.default_rng(seed).random((n, k)) < 0.3] = 0
    scale = np.maximum(np.abs(weight).max(1), 1e-3) / 7
    steps = round_columns(weight, gram, scale, limit=7)
    assert steps.dtype == np.int8
    assert np.abs(steps).max(initial=0) <= 7
    assert (steps[weight == 0] == 0).all()


@pytest.mark.parametrize("seed", range(8))
def test_rounding_lies_between_nearest_and_the_best(seed):
    """Two columns, all neighbours of the nearest grid point tried: GPTQ is never worse than nearest, on the whole."""
    weight, gram = problem(40, 2, seed)
    scale = np.abs(weight).max(1) / 3
    nearest = np.clip(np.rint(weight / scale[:, None]), -3, 3)
    found = round_columns(weight, gram, scale, limit=3)
    best = 0.0
    for row, steps, size in zip(weight, nearest, scale, strict=True):
        choices = [np.clip(steps + move, -3, 3) for move in product((-2, -1, 0, 1, 2), repeat=2)]
        best += min(loss(row[None], (choice * size)[None], gram) for choice in choices)
    reached = loss(weight, found * scale[:, None], gram)
    assert best - 1e-9 <= reached <= loss(weight, nearest * scale[:, None], gram)


def test_damping_makes_what_was_never_seen_invertible():
    gram = np.zeros((3, 3))
    assert np.array_equal(damped(gram, 0.01), 0.01 * np.eye(3))
    gram[0, 0] = 3
    np.testing.assert_allclose(damped(gram, 0.1), np.diag([3.1, 0.1, 0.1]))
