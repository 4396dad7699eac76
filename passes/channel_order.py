"""The order of channels that lets a pruning pattern keep the most: a search on matrices, which knows of no network.

Blocks and N:M groups join neighbouring channels, and only what is small together can go together. Which channels are
neighbours is free. The search looks for the order in which the weights that a pattern keeps have the largest sum of
scores, over all matrices that the channels are an axis of (Pool and Yu, Channel Permutations for N:M Sparsity,
NeurIPS 2021, which swaps two channels at a time).

Here as many channels move at once as there are blocks. Take one channel out of each block. How much each of them
would add to each gap does not depend on where the others go, so the best way to put all of them back is a linear
assignment problem, which is solved exactly. For both kinds of pattern what a channel ``s`` adds to a gap is
``sum over rows of max(0, s - limit)``: with N:M the limit of a row is the N-th largest of the channels that stayed;
with blocks it is what the sum of those lacks to the score of the weakest block that is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

_CACHED = 1 << 17  # float32 values of a piece of work, which then stays in a core's own cache
_PATIENCE = 20  # times that nothing better was found before a part of the order is shuffled
_SHUFFLED = 1 / 8  # that part, at most
_GAIN = 1e-7  # as a share of all scores: less is rounding


class Rule(Protocol):
    """What a pattern keeps of ``values [blocks, width, rows]``, which are not negative; a short block has zeros."""

    @property
    def width(self) -> int:
        """How many neighbours are in a block."""

    def kept(self, values: np.ndarray) -> tuple[float, np.ndarray]:
        """The sum of what is kept, and the thresholds that ``limits`` takes."""

    def limits(self, stayed: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
        """``[blocks, rows]``: above what a channel adds to the blocks of ``stayed``, which have a gap of zeros."""


@dataclass(frozen=True)
class LargestBlocks:
    """All but ``round(amount * blocks)`` of the blocks of ``ranked`` consecutive rows stay, those with largest sums."""

    width: int
    amount: float
    ranked: int | None = None  # all rows together, if None

    def kept(self, values: np.ndarray) -> tuple[float, np.ndarray]:
        """The sum of the largest blocks; the thresholds are the smallest sums kept, ``[rows]``."""
        sums = values.sum(1).T
        rows = len(sums)
        sums = sums.reshape(rows // (self.ranked or rows), -1)
        gone = round(self.amount * sums.shape[1])
        weakest = min(gone, sums.shape[1] - 1)
        parted = np.partition(sums, weakest, axis=1)
        least = parted[:, weakest]
        return float(parted[:, gone:].sum(dtype=np.float64)), np.repeat(least, rows // len(least))

    def limits(self, stayed: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
        """What a block still lacks to be kept."""
        return np.asarray(thresholds - stayed.sum(1))


@dataclass(frozen=True)
class LargestOfEach:
    """The ``count`` largest of each ``width`` neighbours stay: N:M."""

    count: int
    width: int

    def kept(self, values: np.ndarray) -> tuple[float, np.ndarray]:
        """The sum of the largest; no thresholds."""
        largest = np.partition(values, self.width - self.count, axis=1)[:, self.width - self.count :]
        return float(largest.sum(dtype=np.float64)), np.empty(0)

    def limits(self, stayed: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
        """The weakest that would have to go."""
        return np.asarray(np.partition(stayed, self.width - self.count, axis=1)[:, self.width - self.count])


@dataclass(frozen=True)
class FewestBlocks:
    """Blocks stay that have anything: with scores 1 and 0, nonzero weights less nonzero blocks is the sum kept."""

    width: int

    def kept(self, values: np.ndarray) -> tuple[float, np.ndarray]:
        """What each block has more than one of; no thresholds."""
        return float(np.maximum(values.sum(1) - 1, 0).sum(dtype=np.float64)), np.empty(0)

    def limits(self, stayed: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
        """A block that has something already has room for free."""
        return np.asarray(1 - stayed.sum(1))


class View:
    """One matrix that the channels are an axis of.

    Args:
        scores: float ``[rows, length]``, not negative; what each weight counts for.
        positions: int ``[channels, k]``, where along the axis each channel lies, -1 for nowhere; channels of one part
            have them in the same columns. What else lies along the axis stays in place.
        rule: what is kept; blocks are counted from the start of the axis, and the last one may be short.
    """

    def __init__(self, scores: np.ndarray, positions: np.ndarray, rule: Rule) -> None:
        rows, length = scores.shape
        self.blocks = -(-length // rule.width)
        self.values = np.zeros((self.blocks * rule.width, rows), np.float32)
        self.values[:length] = scores.T
        self.positions = positions
        self.rule = rule
        total = float(scores.sum(dtype=np.float64))
        self.weight = 1 / total if total > 0 else 0.0

    def blocks_at(self, place: int) -> list[int]:
        """The blocks that a place lies in, one entry for each of its positions."""
        positions = self.positions[place]
        return [int(block) for block in positions[positions >= 0] // self.rule.width]

    def ordered(self, order: np.ndarray) -> np.ndarray:
        """The values ``[blocks, width, rows]`` with channel ``order[i]`` at place ``i``."""
        source = np.arange(len(self.values))
        here = self.positions >= 0
        source[self.positions[here]] = self.positions[order][here]
        return self.values[source].reshape(self.blocks, self.rule.width, -1)


@dataclass
class _Evaluated:
    """An order, and what the views keep under it."""

    order: np.ndarray
    values: list[np.ndarray] = field(default_factory=list)
    thresholds: list[np.ndarray] = field(default_factory=list)
    kept: float = 0.0  # as a share of all scores, the mean over views


def find_order(
    views: Sequence[View],
    parts: np.ndarray,
    *,
    rounds: int = 300,
    comparisons: float = 2e10,
    seed: int = 0,
) -> np.ndarray:
    """The best order found: int64 ``[channels]``, channel ``order[i]`` at place ``i``; never worse than as it was.

    Channels change places within the same of the ``parts`` (int ``[channels]``) only. Every view counts for the share
    of its scores that is kept, whatever their size. The search ends after ``rounds`` assignments, or as many as make
    ``comparisons`` of one float with another (one core does 1 to 2 billion a second); it is the same on every run
    with the same ``seed``. Once nothing better is found, it goes on from a copy of the best that is partly shuffled.
    """
    random = np.random.default_rng(seed)
    places = _blocks_of_places(views, len(parts))
    current = best = _evaluate(views, np.arange(len(parts)))
    failures = 0
    while rounds > 0 and comparisons > 0 and places:
        rounds -= 1
        gaps = _pick_gaps(random, places, parts)
        order = current.order.copy()
        for part in gaps:
            order[part] = current.order[part][_assign(views, current, part)]
            comparisons -= len(part) ** 2 * sum(view.values.shape[1] * view.positions.shape[1] for view in views)
        found = current if np.array_equal(order, current.order) else _evaluate(views, order)
        if found.kept > current.kept + _GAIN:
            current, failures = found, 0
        else:
            failures += 1
        if current.kept > best.kept:
            best = current
        if failures == _PATIENCE:
            current, failures = _evaluate(views, _shuffled(random, best.order, parts)), 0
    return best.order


def kept_share(views: Sequence[View], order: np.ndarray) -> float:
    """What the views keep under an order, as a share of all scores; the mean over views."""
    return _evaluate(views, order).kept


def _evaluate(views: Sequence[View], order: np.ndarray) -> _Evaluated:
    result = _Evaluated(order)
    for view in views:
        values = view.ordered(order)
        kept, thresholds = view.rule.kept(values)
        result.values.append(values)
        result.thresholds.append(thresholds)
        result.kept += kept * view.weight / len(views)
    return result


def _blocks_of_places(views: Sequence[View], channels: int) -> dict[int, set[tuple[int, int]]]:
    """The blocks, as (view, block), of each place that lies in any."""
    found = {
        place: {(number, block) for number, view in enumerate(views) for block in view.blocks_at(place)}
        for place in range(channels)
    }
    return {place: blocks for place, blocks in found.items() if blocks}


def _pick_gaps(
    random: np.random.Generator, places: dict[int, set[tuple[int, int]]], parts: np.ndarray
) -> list[np.ndarray]:
    """Random places, by part, no two of them in one block of any view, and no further one to be had."""
    taken: set[tuple[int, int]] = set()
    gaps = []
    for place in random.permutation(list(places)).tolist():
        if taken.isdisjoint(places[place]):
            taken |= places[place]
            gaps.append(place)
    picked = np.array(gaps)
    of_part = [picked[parts[picked] == part] for part in np.unique(parts[picked])]
    return [part for part in of_part if len(part) > 1]


def _assign(views: Sequence[View], current: _Evaluated, gaps: np.ndarray) -> np.ndarray:
    """Which of the channels at these places goes to each of them, so that all together add the most."""
    gains = np.zeros((len(gaps), len(gaps)))
    for view, values, thresholds in zip(views, current.values, current.thresholds, strict=True):
        width = view.rule.width
        for positions in view.positions[gaps].T:
            if positions[0] < 0:
                continue
            block, inside = np.divmod(positions, width)
            channels = values[block, inside]
            stayed = values[block]
            stayed[np.arange(len(gaps)), inside] = 0
            gains += view.weight * _gains(channels, view.rule.limits(stayed, thresholds))
    from scipy.optimize import linear_sum_assignment  # slow to import, and few compilations order channels

    return np.asarray(linear_sum_assignment(gains, maximize=True)[1])


def _gains(channels: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """``[gaps, channels]``: the sums over rows of ``max(0, channel - limit)``, but for a constant for each gap."""
    gaps, rows = limits.shape
    gains = np.zeros((gaps, len(channels)))
    step = max(1, _CACHED // len(channels))
    for start in range(0, rows, step):
        some, least = (np.ascontiguousarray(each[:, start : start + step]) for each in (channels, limits))
        larger, ones = np.empty_like(some), np.ones(some.shape[1], np.float32)
        for gap in range(gaps):
            gains[gap] += np.maximum(some, least[gap], out=larger) @ ones
    return gains


def _shuffled(random: np.random.Generator, order: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """``order`` with some channels, two to six in a short one, in random places of their part."""
    order = order.copy()
    count = int(random.integers(2, max(6, round(len(order) * _SHUFFLED)), endpoint=True))
    some = random.choice(len(order), min(count, len(order)), replace=False)
    for part in np.unique(parts[some]):
        own = some[parts[some] == part]
        order[own] = order[random.permutation(own)]
    return order
