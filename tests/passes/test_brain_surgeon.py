"""On matrices small enough that all choices can be tried."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pumice.passes import greedy_surgeon as greedy
from pumice.passes.brain_surgeon import alternate, damped, inverse_factor, refit, round_columns, sparsegpt
from pumice.passes.greedy_surgeon import greedy_zeros
from pumice.passes.prune_rows import prune_rows
from pumice.passes.prune_spec import OBC, SparseGPT
from pumice.passes.statistics import Moments
from pumice.patterns import Pattern


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


def greedy_surgeon(weight, gram, width, amount):
    """Optimal Brain Compression (arXiv 2208.11580): the block that loses least goes, the rest make up for it, again."""
    weight, inverses = weight.copy(), [np.linalg.inv(gram) for _ in weight]
    left = {(n, c) for n in range(len(weight)) for c in range(0, weight.shape[1], width)}
    for _ in range(round(amount * len(left))):
        losses = {}
        for n, c in left:
            here = slice(c, c + width)
            losses[n, c] = weight[n, here] @ np.linalg.solve(inverses[n][here, here], weight[n, here])
        n, c = min(losses, key=losses.__getitem__)
        here = slice(c, c + width)
        inverse = inverses[n]
        gain = inverse[:, here] @ np.linalg.inv(inverse[here, here])
        weight[n] -= gain @ weight[n, here]
        weight[n, here] = 0
        inverses[n] = inverse - gain @ inverse[here]
        inverses[n][here, here] += np.eye(width)  # of columns that are gone: never looked at, but must stay invertible
        left.remove((n, c))
    for n, row in enumerate(weight):
        row[[j for j in range(len(row)) if (n, j - j % width) not in left]] = 0
    return weight


@pytest.mark.parametrize("text", ["unstructured", "1x4"])
@pytest.mark.parametrize("amount", [0.5, 0.75])
def test_the_greedy_choice_is_the_one_by_hand_and_beats_one_pass(text, amount):
    """Over ten layers; refits are about as good where inputs are as strongly correlated as these."""
    pattern, totals = Pattern.parse(text), np.zeros(4)
    for seed in range(10):
        weight, gram = problem(6, 32, seed)
        moments = Moments(gram[None], np.zeros((1, 32)), 50)
        specs = [
            OBC(pattern, amount, damping=1e-6),
            *(SparseGPT(pattern, amount, damping=1e-6, refits=n) for n in (30, 0)),
        ]
        found = [prune_rows(weight[:, None], spec, amount, moments)[:, 0] for spec in specs]
        found.insert(0, greedy_surgeon(weight, gram, pattern.width, amount))
        assert len({int((each == 0).sum()) for each in found}) == 1
        totals += [loss(weight, each, gram) for each in found]
    assert totals[1] == pytest.approx(totals[0], rel=0.02)
    assert max(totals[1:3]) < totals[3]
    assert totals[1] < 1.1 * totals[2]


def test_zeros_of_n_m_are_the_greedy_choice_with_few_to_choose_from():
    """Of 8 columns 2 in each 4 go: the loss is that of the best of all 36 choices, or near."""
    ratios = []
    for seed in range(8):
        weight, gram = problem(1, 8, seed)
        best = np.inf
        for pair in product(combinations(range(4), 2), combinations(range(4, 8), 2)):
            zero = np.isin(np.arange(8), sum(pair, ()))
            best = min(best, loss(weight, best_weights(weight[0], gram, zero)[None], gram))
        zero = greedy_zeros(weight[:, None], gram, Pattern(group=(2, 4)), 0.5)
        assert zero.reshape(2, 4).sum(1).tolist() == [2, 2]
        ratios.append(loss(weight, refit(weight, gram, zero), gram) / best)
    assert min(ratios) == pytest.approx(1, rel=1e-6)
    assert np.median(ratios) < 1.2


def test_several_at_a_time_are_nearly_as_good(monkeypatch):
    weight, gram = problem(6, 64, 3)
    losses = []
    for steps in (64, 16):
        monkeypatch.setattr(greedy, "_STEPS", steps)
        zero = greedy_zeros(weight[:, None], gram, Pattern(), 0.5)
        assert zero.sum() == 192
        losses.append(loss(weight, refit(weight, gram, zero), gram))
    assert losses[1] < 1.5 * losses[0] < 0.5 * loss(weight, weight * (np.abs(weight) > np.median(np.abs(weight))), gram)


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
