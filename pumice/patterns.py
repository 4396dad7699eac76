"""The patterns that zeros come in: single weights, blocks, and N of M neighbours.

Patterns see a weight as rows ``[N, taps, C]`` (see ``passes/layers.py``; ``frontend/torch_patterns.py`` does so on
tensors). A *unit* is what is kept or dropped as a whole: a block of output by input channels at one kernel
position, or a single weight. Where a channel count is no multiple of the block, the last block is shorter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from pumice.errors import UsageError

BLOCKS = {"1x4": (1, 4), "4x1": (4, 1), "2x4": (2, 4), "4x4": (4, 4), "16x4": (16, 4)}
KNOWN = f"unstructured, {', '.join(BLOCKS)} or N:M with N < M"


@dataclass(frozen=True)
class Pattern:
    """``height`` x ``width`` blocks (output x input channels), or ``group``: N left of any M input channels."""

    height: int = 1
    width: int = 1
    group: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read ``unstructured``, ``1x4``, ``2:4``, ...; raises UsageError for anything else."""
        if text == "unstructured":
            return cls()
        if text in BLOCKS:
            return cls(*BLOCKS[text])
        match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
        n, m = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 0 < n < m:
            raise UsageError(f"pruning pattern {text!r} is not known; there are {KNOWN}")
        return cls(group=(n, m))

    def __str__(self) -> str:
        if self.group is not None:
            return f"{self.group[0]}:{self.group[1]}"
        return "unstructured" if (self.height, self.width) == (1, 1) else f"{self.height}x{self.width}"

    @property
    def needs_neighbours(self) -> bool:
        """Whether a unit spans several input channels, which a depthwise layer does not have."""
        return self.group is not None or self.width > 1

    @property
    def amount(self) -> float | None:
        """The share of zeros that the pattern itself says; None where it is free."""
        return None if self.group is None else 1 - self.group[0] / self.group[1]

    @property
    def most(self) -> float:
        """The largest share of zeros that there can be."""
        return 1.0 if self.amount is None else self.amount

    def unit_scores(self, scores: np.ndarray) -> np.ndarray:
        """The sums of ``scores [N, taps, C]`` over blocks: float64 ``[ceil(N / height), taps, ceil(C / width)]``."""
        total = np.asarray(scores, np.float64)
        if self.height > 1:
            total = np.add.reduceat(total, np.arange(0, total.shape[0], self.height), axis=0)
        if self.width > 1:
            total = np.add.reduceat(total, np.arange(0, total.shape[2], self.width), axis=2)
        return total

    def expand(self, units: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """``units``, one value a block, as one value a weight of rows of this ``shape``."""
        return units.repeat(self.height, axis=0).repeat(self.width, axis=2)[: shape[0], :, : shape[2]]

    def zeros(self, scores: np.ndarray, amount: float) -> np.ndarray:
        """Which weights go, bool ``[N, taps, C]``: those of the units with the least sums of ``scores``.

        With blocks, ``round(amount * units)`` of them; with N:M all but the N largest of each M neighbours, and a
        last group that is shorter keeps N too. Of equals the first goes, on every machine.
        """
        if self.group is not None:
            return _group_zeros(scores, *self.group)
        units = self.unit_scores(scores)
        return self.expand(smallest(units.ravel(), amount).reshape(units.shape), scores.shape)


def smallest(scores: np.ndarray, amount: float) -> np.ndarray:
    """Which ``round(amount * size)`` of the flat ``scores`` are smallest; of equals the first."""
    count = round(amount * scores.size)
    if count == 0:
        return np.zeros(scores.shape, bool)
    limit = np.partition(scores, count - 1)[count - 1]
    chosen: np.ndarray = scores < limit
    chosen[np.flatnonzero(scores == limit)[: count - int(chosen.sum())]] = True
    return chosen


def _group_zeros(scores: np.ndarray, n: int, m: int) -> np.ndarray:
    channels = scores.shape[2]
    # Padding smaller than any score goes first.
    short = -channels % m
    padded = np.pad(scores, ((0, 0), (0, 0), (0, short)), constant_values=-1)
    groups = padded.reshape(*scores.shape[:2], -1, m)
    order = np.argsort(groups, axis=-1, kind="stable")
    zero = np.zeros(groups.shape, bool)
    np.put_along_axis(zero, order[..., : m - n], True, axis=-1)
    return zero.reshape(*scores.shape[:2], -1)[:, :, :channels]
