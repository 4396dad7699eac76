"""What pruning would count in each layer, seen along groups of channels: what the search for orders looks at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from pumice.passes.channel_groups import ChannelGroup, Slot, source_indices
from pumice.passes.channel_order import FewestBlocks, LargestBlocks, LargestOfEach, Rule, View
from pumice.passes.layers import Layer
from pumice.passes.prune_rows import saliency, zeros
from pumice.passes.prune_spec import Magnitude, NearZero, Surgeon, Wanda
from pumice.passes.statistics import Moments
from pumice.patterns import Pattern

Spec = Magnitude | NearZero | Wanda | Surgeon

OUTPUTS, INPUTS = 0, 2  # the axes of rows [N, taps, C]
_FILLED = Pattern.parse("1x4")  # the blocks that are stored for zeros without a pattern


@dataclass(frozen=True, eq=False)
class ScoredLayer:
    """One layer's weight as the pattern sees it.

    scores: ``[N, taps, C]``, not negative: what each weight counts for; with ``counted`` 1 for a weight that is there
    and 0 for none, and then the fewest blocks that hold them all are looked for. by_row: whether each output channel
    is pruned by itself.
    """

    layer: Layer
    scores: np.ndarray
    pattern: Pattern
    amount: float
    by_row: bool = False
    counted: bool = False

    def moved(self, axis: int, indices: np.ndarray) -> ScoredLayer:
        """The same with the channels along an axis of the rows taken from these indices."""
        return replace(self, scores=self.scores.take(indices, axis))

    def kept(self) -> float:
        """The share of the scores that stays; with ``counted`` the share of the blocks that holds nothing."""
        if self.counted:
            return float((self.pattern.unit_scores(self.scores) == 0).mean())
        parts = self.scores[:, None] if self.by_row else self.scores[None]
        gone = sum(float(part[self.pattern.zeros(part, self.amount)].sum()) for part in parts)
        total = float(self.scores.sum())
        return 1 - gone / total if total > 0 else 1.0

    def view(self, axis: int, positions: np.ndarray) -> View | None:
        """The scores along one axis, in blocks; None where its order is nothing to the pattern."""
        rule = self.rule(axis)
        if rule is None:
            return None
        height, width = self.pattern.height, self.pattern.width
        # Rows that go together are one.
        matrix = self._joined(height, OUTPUTS) if axis == INPUTS else self._joined(width, INPUTS).transpose(1, 2, 0)
        return View(matrix.reshape(-1, matrix.shape[-1]), positions, rule)

    def rule(self, axis: int) -> Rule | None:
        """What the pattern keeps along an axis; None where it looks at no neighbours there."""
        width = self.pattern.width if axis == INPUTS else self.pattern.height
        if axis == INPUTS and self.pattern.group is not None:
            return LargestOfEach(*self.pattern.group)
        if width == 1:
            return None
        if self.counted:
            return FewestBlocks(width)
        return LargestBlocks(width, self.amount, self.scores.shape[1] if self.by_row else None)

    def _joined(self, count: int, axis: int) -> np.ndarray:
        if count == 1:
            return self.scores
        join = np.maximum if self.counted else np.add
        return np.asarray(join.reduceat(self.scores, np.arange(0, self.scores.shape[axis], count), axis))


def score(layer: Layer, rows: np.ndarray, spec: Spec, amount: float, moments: Moments | None) -> ScoredLayer:
    """What ``spec`` counts in the layer's weight ``rows``, when it takes ``amount`` of it.

    Without a pattern, or with a threshold, what goes does not depend on the order, but the blocks that hold what stays
    do. sparsegpt and obc are scored by the losses that they start from, which make up for none of them.
    """
    pattern = spec.pattern
    if isinstance(spec, NearZero):
        stays = ~zeros(rows, replace(spec, pattern=Pattern()), amount)
    elif pattern == Pattern():
        simple = Wanda(pattern, amount, spec.allocation) if isinstance(spec, Surgeon) else spec
        stays = ~zeros(rows, simple, amount, moments)
    else:
        by_row = isinstance(spec, Wanda) and spec.allocation == "uniform" and pattern.height == 1
        return ScoredLayer(layer, saliency(rows, spec, moments), pattern, amount, by_row)
    return score_mask(layer, stays, _FILLED if pattern == Pattern() else pattern)


def score_mask(layer: Layer, stays: np.ndarray, pattern: Pattern) -> ScoredLayer:
    """A weight of which it is known what stays, bool ``[N, taps, C]``."""
    return ScoredLayer(layer, stays.astype(np.float32), pattern, 0.0, counted=True)


@dataclass(frozen=True, eq=False)
class Bundle:
    """Groups of channels that share an axis of some weight, and so compete for what that layer keeps."""

    groups: tuple[ChannelGroup, ...]

    @property
    def parts(self) -> np.ndarray:
        """int ``[channels]``: the group of each channel; those of all groups are numbered in one row."""
        return np.repeat(np.arange(len(self.groups)), [group.channels for group in self.groups])

    def orders(self, order: np.ndarray) -> list[np.ndarray]:
        """The order of all channels as one of each group."""
        starts = np.cumsum([0, *(group.channels for group in self.groups)])
        return [order[start:end] - start for start, end in pairwise(starts)]

    def moves(self, order: np.ndarray, layers: Mapping[str, Layer]) -> Iterator[tuple[str, int, np.ndarray]]:
        """Which weight of a layer takes its values from which indices along which axis of its rows."""
        for group, own in zip(self.groups, self.orders(order), strict=True):
            for slot in group.slots:
                layer = layers.get(slot.weight)
                if layer is not None:
                    yield slot.weight, rows_axis(layer, slot), source_indices(slot, own, _length(layer, slot))

    def views(self, scored: Mapping[str, ScoredLayer]) -> list[View]:
        """The matrices of the scored layers along these channels; ``scored`` is by weight name."""
        axes: dict[tuple[str, int], list[tuple[int, np.ndarray]]] = {}
        starts = np.cumsum([0, *(group.channels for group in self.groups)])
        for group, start in zip(self.groups, starts, strict=False):
            for slot in group.slots:
                if slot.weight in scored and _is_separable(slot, scored[slot.weight]):
                    key = slot.weight, rows_axis(scored[slot.weight].layer, slot)
                    axes.setdefault(key, []).append((int(start), slot.positions))
        places = {}
        for key, pieces in axes.items():
            places[key] = np.full((starts[-1], max(positions.shape[1] for _, positions in pieces)), -1)
            for start, positions in pieces:
                places[key][start : start + len(positions), : positions.shape[1]] = positions
        found = (scored[name].view(axis, positions) for (name, axis), positions in places.items())
        return [view for view in found if view is not None]


def bundles_of(groups: Sequence[ChannelGroup]) -> list[Bundle]:
    """``groups`` put together where they share an axis of a weight."""
    owner: dict[tuple[str, int], int] = {}
    members: dict[int, list[ChannelGroup]] = {}
    for number, group in enumerate(groups):
        axes = [(slot.weight, slot.axis) for slot in group.slots]
        joined = sorted({owner[axis] for axis in axes if axis in owner})
        members[number] = [each for earlier in joined for each in members.pop(earlier)] + [group]
        owner.update((axis, number) for axis in axes)
        owner.update((axis, number) for axis, earlier in owner.items() if earlier in joined)
    return [Bundle(tuple(each)) for each in members.values()]


def rows_axis(layer: Layer, slot: Slot) -> int:
    """The axis of the layer's rows that a slot of its weight lies along."""
    return OUTPUTS if slot.axis == layer.channel_axis else INPUTS


def _length(layer: Layer, slot: Slot) -> int:
    return int(layer.weight.ty.shape[slot.axis])


def _is_separable(slot: Slot, scored: ScoredLayer) -> bool:
    """Whether no block holds two values of one channel; behind a flatten they do, and no order changes much."""
    rule = scored.rule(rows_axis(scored.layer, slot))
    if rule is None:
        return False
    blocks = np.sort(slot.positions // rule.width, axis=1)
    return bool((blocks[:, 1:] != blocks[:, :-1]).all())
