"""The search against every order there is, where those can be tried, and against properties elsewhere."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pumice.passes.channel_order import FewestBlocks, LargestBlocks, LargestOfEach, Rule, View, find_order, kept_share


def largest_blocks(scores, width, amount, by_row=False):
    """The sum of the blocks that stay, in plain Python."""
    total = 0.0
    for rows in [[row] for row in scores.tolist()] if by_row else [scores.tolist()]:
        blocks = sorted(sum(row[i : i + width]) for row in rows for i in range(0, len(row), width))
        total += sum(blocks[round(amount * len(blocks)) :])
    return total


def largest_of_each(scores, count, width):
    return sum(sum(sorted(row[i : i + width])[-count:]) for row in scores.tolist() for i in range(0, len(row), width))


def nonzero_blocks(scores, width):
    return sum(any(row[i : i + width]) for row in scores.tolist() for i in range(0, len(row), width))


# What is kept under a rule, written a second time.
RULES = {
    LargestBlocks(4, 0.5): lambda s: largest_blocks(s, 4, 0.5),
    LargestBlocks(2, 0.75): lambda s: largest_blocks(s, 2, 0.75),
    LargestBlocks(4, 0.5, ranked=1): lambda s: largest_blocks(s, 4, 0.5, by_row=True),
    LargestOfEach(2, 4): lambda s: largest_of_each(s, 2, 4),
    LargestOfEach(1, 3): lambda s: largest_of_each(s, 1, 3),
    FewestBlocks(4): lambda s: np.count_nonzero(s) - nonzero_blocks(s, 4),
}


def matrix(rule: Rule, rows: int, channels: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if isinstance(rule, FewestBlocks):
        return (generator.random((rows, channels)) < 0.4).astype(np.float32)
    # Eighths: sums are exact in float32, whatever their order.
    return (generator.integers(0, 64, (rows, channels)) * generator.choice([1, 4], channels)).astype(np.float32) / 8


def whole(channels: int) -> np.ndarray:
    return np.arange(channels)[:, None]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("channels", [7, 8])
def test_the_best_of_all_orders_is_found(rule, channels):
    scores = matrix(rule, 5, channels, seed=channels + 3)
    best = max(RULES[rule](scores[:, list(order)]) for order in permutations(range(channels)) if grouped(order, rule))
    order = find_order([View(scores, whole(channels), rule)], np.zeros(channels, int))
    assert RULES[rule](scores[:, order]) == pytest.approx(best)
    assert RULES[rule](scores[:, order]) > RULES[rule](scores)  # or the test would show nothing


def grouped(order: tuple[int, ...], rule: Rule) -> bool:
    """One of the orders that differ only within blocks."""
    return all(order[i] < order[i + 1] for i in range(len(order) - 1) if (i + 1) % rule.width)


@settings(deadline=None, max_examples=60)
@given(
    rule=st.sampled_from(list(RULES)),
    rows=st.integers(1, 9),
    channels=st.integers(1, 21),
    parts=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_an_order_stays_within_its_parts_and_never_loses(rule, rows, channels, parts, seed):
    scores = matrix(rule, rows, channels, seed)
    part_of = np.random.default_rng(seed).integers(0, parts, channels)
    view = View(scores, whole(channels), rule)
    order = find_order([view], part_of, rounds=20, seed=seed)
    np.testing.assert_array_equal(np.sort(order), np.arange(channels))
    np.testing.assert_array_equal(part_of[order], part_of)
    assert RULES[rule](scores[:, order]) >= RULES[rule](scores) * (1 - 1e-6)
    if scores.any():
        assert kept_share([view], order) == pytest.approx(RULES[rule](scores[:, order]) / scores.sum(), abs=1e-5)


def test_channels_that_are_small_together_come_together():
    generator = np.random.default_rng(0)
    kind = generator.permutation(np.repeat(np.arange(6), 4))
    scores = (generator.random((40, 6)) < 0.5).astype(np.float32)[:, kind] + 0.01
    order = find_order([View(scores, whole(24), LargestBlocks(4, 0.5))], np.zeros(24, int))
    assert (kind[order].reshape(6, 4) == kind[order].reshape(6, 4)[:, :1]).all()


def test_the_same_seed_gives_the_same_order():
    view = View(matrix(LargestBlocks(4, 0.5), 9, 32, 1), whole(32), LargestBlocks(4, 0.5))
    first, second, other = (find_order([view], np.zeros(32, int), rounds=5, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_two_views_share_one_order():
    """One wants blocks of columns, one wants pairs, somewhere else along its axis: the order serves their sum."""
    rules = LargestBlocks(4, 0.5), LargestBlocks(2, 0.5)
    scores = [matrix(rules[0], 4, 8, 1), matrix(rules[1], 3, 10, 2)]
    positions = np.array([9, 8, 7, 6, 3, 2, 1, 0])[:, None]  # two values of others, in the middle
    views = [View(scores[0], whole(8), rules[0]), View(scores[1], positions, rules[1])]

    def kept(order):
        placed = scores[1].copy()
        placed[:, positions[:, 0]] = scores[1][:, positions[order, 0]]
        shares = largest_blocks(scores[0][:, order], 4, 0.5), largest_blocks(placed, 2, 0.5)
        return sum(share / each.sum() for share, each in zip(shares, scores, strict=True)) / 2

    best = max(kept(np.array(order)) for order in permutations(range(8)) if grouped(order, rules[1]))
    order = find_order(views, np.zeros(8, int), rounds=600)
    assert kept(order) == pytest.approx(best)
    assert kept_share(views, order) == pytest.approx(best, rel=1e-5)


def test_channels_with_several_places_move_as_one():
    """Channel i lies at i and at 8 + i, as in the rows of a layer that feeds a convolution in two groups."""
    scores = matrix(LargestBlocks(4, 0.5), 6, 16, 5)
    positions = np.stack([np.arange(8), 8 + np.arange(8)], axis=1)
    view = View(scores, positions, LargestBlocks(4, 0.5))

    def kept(order):
        return largest_blocks(np.concatenate([scores[:, :8][:, order], scores[:, 8:][:, order]], 1), 4, 0.5)

    best = max(kept(list(order)) for order in permutations(range(8)) if grouped(order, view.rule))
    assert kept(find_order([view], np.zeros(8, int))) == pytest.approx(best)


def test_channels_that_a_view_does_not_have_are_nothing_to_it():
    scores = matrix(LargestBlocks(4, 0.5), 6, 8, 5)
    positions = np.concatenate([whole(8), np.full((8, 1), -1)])
    order = find_order([View(scores, positions, LargestBlocks(4, 0.5))], np.repeat([0, 1], 8))
    np.testing.assert_array_equal(order[8:], np.arange(8, 16))
    alone = find_order([View(scores, whole(8), LargestBlocks(4, 0.5))], np.zeros(8, int))
    assert largest_blocks(scores[:, order[:8]], 4, 0.5) == largest_blocks(scores[:, alone], 4, 0.5)
