"""Where a layer reads and writes: the distance from an output's position to what each of its taps reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pumice.schedules.geometry import Geometry, Window


@dataclass(frozen=True)
class Places:
    """A layer's taps, the plane that they read and the plane of its output."""

    window: Window
    source: Geometry
    target: Geometry

    @cached_property
    def shifts(self) -> np.ndarray:
        """``tap_offsets`` of the window."""
        return tap_offsets(self.window, self.source, self.target)

    @property
    def is_pointwise(self) -> bool:
        """Whether an output reads one word column, at its own position, and positions lie side by side."""
        planes = (self.source, self.target)
        alike = self.source.span == self.target.span and not any(plane.is_padded for plane in planes)
        return alike and self.shifts.tolist() == [0]

    def vectors(self, lanes: int) -> int:
        """Vectors of positions that are computed."""
        return -(-self.target.span // lanes)

    def halo(self, lanes: int) -> int:
        """Vectors that the taps of one word touch beyond those of one tap at the same positions."""
        by_phase: dict[tuple[int, int], list[int]] = {}
        for phase, shift in self.window.taps():
            by_phase.setdefault(phase, []).append(shift[0] * self.source.pitch + shift[1])
        return sum(-(-(max(shifts) - min(shifts)) // lanes) for shifts in by_phase.values())


def tap_offsets(window: Window, source: Geometry, target: Geometry) -> np.ndarray:
    """How far from an output's position each tap of ``window`` reads, within one channel word: int64 ``[taps]``."""
    phases = window.phases()
    shifts = [
        phases.index(phase) * source.positions + shift[0] * source.pitch + shift[1] for phase, shift in window.taps()
    ]
    return np.asarray(shifts, np.int64) + (source.base - target.base)
