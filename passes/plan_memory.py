"""Where each value lies in the workspace, so that values that live at once do not overlap.

Greedy by size with best fit (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference",
arXiv 2001.03288, section 5.2): the largest value is placed first, each next one into the smallest gap that takes it
between the values that live when it does, or after them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pumice.targets.plan import align


@dataclass(frozen=True)
class Lifetime:
    """A value of ``size`` bytes, written by step ``first`` and read last by step ``last`` (both counted in)."""

    size: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Whether both live during some step."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Placement:
    """``offsets`` of the values, in bytes and aligned, in a workspace of ``size`` bytes."""

    offsets: tuple[int, ...]
    size: int


def plan_memory(lifetimes: Sequence[Lifetime]) -> Placement:
    """Place every value; ties go to the one that is written first, so that equal models get equal plans."""
    order = sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].size, lifetimes[i].first, i))
    offsets: dict[int, int] = {}
    for index in order:
        neighbours = [(offsets[i], align(lifetimes[i].size)) for i in offsets if lifetimes[i].meets(lifetimes[index])]
        offsets[index] = _best_fit(align(lifetimes[index].size), sorted(neighbours))
    size = max((offset + align(lifetimes[index].size) for index, offset in offsets.items()), default=0)
    return Placement(tuple(offsets[index] for index in range(len(lifetimes))), size)


def _best_fit(size: int, taken: list[tuple[int, int]]) -> int:
    """The start of the smallest gap between the ``taken`` (offset, size) that has room, or the end."""
    best, best_gap, end = None, 0, 0
    for offset, length in taken:
        gap = offset - end
        if gap >= size and (best is None or gap < best_gap):
            best, best_gap = end, gap
        end = max(end, offset + length)
    return end if best is None else best
