"""From which share of zeros on sparse is as fast as dense."""

from __future__ import annotations

from collections.abc import Sequence


def break_even(curve: Sequence[tuple[float, float]], dense: float) -> float | None:
    """The share of zeros from which on the time of ``curve`` (share of zeros, time) stays at or below ``dense``.

    Interpolated between the measured shares; the smallest of them where all are below, None where not even the
    largest is.
    """
    points = sorted(curve)
    above = [i for i, (_, time) in enumerate(points) if time > dense]
    if not above:
        return points[0][0] if points else None
    last = above[-1]
    if last == len(points) - 1:
        return None
    (zeros, slow), (more_zeros, fast) = points[last], points[last + 1]
    return zeros + (more_zeros - zeros) * (slow - dense) / (slow - fast)
