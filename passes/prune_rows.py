"""Pruning the weight of one layer, as rows ``[N, taps, C]``: what each method of ``prune_spec`` makes zero.

A method is a way to score single weights; a pattern turns scores into zeros; a surgeon changes what is left as well.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pumice.errors import PumiceError
from pumice.passes.brain_surgeon import alternate, damped, losses, refit, sparsegpt
from pumice.passes.greedy_surgeon import greedy_zeros
from pumice.passes.prune_spec import Magnitude, NearZero, PruneSpec, SparseGPT, Surgeon, Wanda
from pumice.passes.statistics import Moments
from pumice.patterns import Pattern, smallest


def prune_rows(rows: np.ndarray, spec: PruneSpec, amount: float, moments: Moments | None = None) -> np.ndarray:
    """``rows`` with ``amount`` of the units of the spec's pattern zero, in their own dtype; zeros stay zero.

    ``moments`` of the layer's input are what wanda, sparsegpt and obc need. The spec's own amount is not looked at: an
    allocation may have given the layer another one (near-zero has a threshold instead).
    """
    if isinstance(spec, Surgeon):
        return _operated(rows, spec, amount, _needed(moments, spec)).astype(rows.dtype)
    return np.where(zeros(rows, spec, amount, moments), np.zeros((), rows.dtype), rows)


def zeros(rows: np.ndarray, spec: PruneSpec, amount: float, moments: Moments | None = None) -> np.ndarray:
    """Which weights magnitude, near-zero or wanda make zero: bool ``[N, taps, C]``."""
    if isinstance(spec, NearZero):
        return _near_zero(rows, spec)
    assert isinstance(spec, Magnitude | Wanda)
    scores = saliency(rows, spec, moments)
    if isinstance(spec, Wanda) and spec.allocation == "uniform" and spec.pattern.height == 1:
        return np.concatenate([spec.pattern.zeros(row[None], amount) for row in scores])
    return spec.pattern.zeros(scores, amount)


def saliency(rows: np.ndarray, spec: PruneSpec, moments: Moments | None = None) -> np.ndarray:
    """What each weight counts for, float64 ``[N, taps, C]``; a unit counts for the sum of its weights.

    magnitude: |w|, or w squared with norm=l2. wanda: |w| times the root mean square of its input. sparsegpt and obc:
    the square of that, which is its loss while nothing makes up for it; it serves to compare layers.
    """
    size: np.ndarray = np.abs(rows).astype(np.float64)
    if isinstance(spec, Magnitude):
        return size**2 if spec.norm == "l2" else size
    size = size * input_sizes(rows.shape, _needed(moments, spec))
    return size**2 if isinstance(spec, Surgeon) else size


def input_sizes(shape: tuple[int, ...], moments: Moments) -> np.ndarray:
    """The root mean square of what each weight of rows of this ``shape`` is multiplied by: ``[N, taps, C]``."""
    sizes: np.ndarray = np.sqrt(np.maximum(moments.mean_square, 0))[moments.of_rows(shape[0])]
    return sizes.reshape(shape)


def _near_zero(rows: np.ndarray, spec: NearZero) -> np.ndarray:
    size = np.abs(rows).astype(np.float64)
    threshold = spec.threshold * (float(np.sqrt(np.mean(np.square(size)))) if spec.relative else 1.0)
    larger = spec.pattern.unit_scores(size > threshold) > 0
    return spec.pattern.expand(~larger, rows.shape)


def _operated(rows: np.ndarray, spec: Surgeon, amount: float, moments: Moments) -> np.ndarray:
    """Group by group, since each has its own inputs."""
    parts = np.split(rows, len(moments.gram))
    return np.concatenate(
        [_prune_group(part, spec, amount, gram) for part, gram in zip(parts, moments.gram, strict=True)]
    )


def _prune_group(rows: np.ndarray, spec: Surgeon, amount: float, gram: np.ndarray) -> np.ndarray:
    weight, was_zero = rows.reshape(len(rows), -1).astype(np.float64), rows.reshape(len(rows), -1) == 0
    gram = damped(gram, spec.damping)
    if not isinstance(spec, SparseGPT):
        return refit(weight, gram, greedy_zeros(rows, gram, spec.pattern, amount)).reshape(rows.shape)
    if spec.refits:
        zero = alternate(weight, gram, _gradually(rows.shape, spec.pattern, amount, was_zero), spec.refits)
        return refit(weight, gram, zero).reshape(rows.shape)
    pattern = spec.pattern
    units = _units(rows.shape, pattern.group[1] if pattern.group else pattern.width)
    found = sparsegpt(weight, gram, units, _Groups(pattern) if pattern.group else _Blocks(pattern, amount))
    if (was_zero & (found != 0)).any():  # what was zero before took over errors of others, who must do without
        found = refit(weight, gram, (found == 0) | was_zero)
    return found.reshape(rows.shape)


def _gradually(
    shape: tuple[int, ...], pattern: Pattern, amount: float, was_zero: np.ndarray
) -> Callable[[np.ndarray, float], np.ndarray]:
    """Zeros that come in by a cubic schedule over the first two thirds of the way (Zhu and Gupta, arXiv:1710.01878)."""

    def project(scores: np.ndarray, progress: float) -> np.ndarray:
        share = 1 - (1 - min(1.0, 1.5 * progress)) ** 3
        if pattern.group is not None and share < 1:
            n, m = pattern.group  # the group's own number of zeros, in whole weights
            now = Pattern(group=(m - round((m - n) * share), m)) if round((m - n) * share) else None
        else:
            now = pattern
        scored = np.where(was_zero, 0, scores).reshape(shape)
        zero = now.zeros(scored, amount * share).reshape(scores.shape) if now else np.zeros(scores.shape, bool)
        return np.asarray(zero | was_zero)

    return project


def _units(shape: tuple[int, ...], width: int) -> list[slice]:
    """The columns of ``[N, taps * C]`` in runs of ``width`` input channels of one tap; the last of a tap is shorter."""
    _, taps, channels = shape
    return [
        slice(tap * channels + c, tap * channels + min(c + width, channels))
        for tap in range(taps)
        for c in range(0, channels, width)
    ]


class _Blocks:
    """Picks the blocks with the least losses, of a run of columns after the other, ``amount`` of all seen so far."""

    def __init__(self, pattern: Pattern, amount: float) -> None:
        self._pattern = pattern
        self._amount = amount
        self._seen = self._gone = 0

    def __call__(self, weight: np.ndarray, factor: np.ndarray, units: list[slice]) -> np.ndarray:
        height = self._pattern.height
        each = np.stack([losses(weight[:, unit], factor[unit, unit]) for unit in units], axis=1)
        total = np.add.reduceat(each, np.arange(0, len(each), height), axis=0)
        self._seen += total.size
        count = min(max(round(self._amount * self._seen) - self._gone, 0), total.size)
        self._gone += count
        zero = smallest(total.ravel(), count / total.size).reshape(total.shape)
        zero = zero.repeat(height, axis=0)[: len(weight)]
        widths = [unit.stop - unit.start for unit in units]
        return np.asarray(np.repeat(zero, widths, axis=1))


class _Groups:
    """Picks all but the N largest losses of each M neighbours."""

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern

    def __call__(self, weight: np.ndarray, factor: np.ndarray, units: list[slice]) -> np.ndarray:
        each = np.square(weight / np.diagonal(factor))
        return np.concatenate([self._pattern.zeros(each[:, None, unit], 0.0)[:, 0] for unit in units], axis=1)


def _needed(moments: Moments | None, spec: PruneSpec) -> Moments:
    if moments is None:
        raise PumiceError(f"{spec} was called without the layer's input moments; this is a defect in Pumice")
    return moments
