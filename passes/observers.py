"""Observers: the range of a tensor, from samples seen one at a time, to be covered by the 256 values of a byte.

Memory does not grow with the samples. Histograms have bins of one power-of-two width, aligned at zero, that
merge in pairs when the range grows; so what they hold does not depend on the order of the samples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np

from pumice.errors import ModelError

_BINS = 2048
_LEVELS = 256
_SMALLEST_SCALE = 2.0**-100  # far from float32's denormals, whose reciprocal overflows


def affine_uint8(lo: float, hi: float) -> tuple[float, int]:
    """Scale (a float32 value) and zero point in 0..255 that cover ``[lo, hi]``, with 0 exactly representable.

    The range is widened to contain 0; a range of only 0 has scale 1.
    """
    lo, hi = min(float(lo), 0.0), max(float(hi), 0.0)
    if lo == hi:
        return 1.0, 0
    scale = float(np.float32(max((hi - lo) / (_LEVELS - 1), _SMALLEST_SCALE)))
    return scale, int(np.clip(np.rint(-lo / scale), 0, _LEVELS - 1))


class Observer(ABC):
    """Watches one tensor."""

    def __init__(self, name: str) -> None:
        """``name`` is the tensor's, for messages."""
        self.name = name

    def observe(self, array: np.ndarray) -> None:
        """Take one sample into account, of any shape; raises ModelError where it has NaN or infinity."""
        values = np.asarray(array, np.float32).reshape(-1)
        if values.size == 0:
            return
        if not np.isfinite(values).all():
            raise ModelError(
                f"tensor {self.name!r} is not finite on the calibration data, so it has no range; "
                "look for samples that overflow in the model, or keep the layers that read it float"
            )
        self._observe(values)

    @abstractmethod
    def range(self) -> tuple[float, float]:
        """The range to be covered; ``(0, 0)`` before any sample."""

    @abstractmethod
    def _observe(self, values: np.ndarray) -> None: ...


class MinMaxObserver(Observer):
    """All that was seen."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._range: tuple[float, float] | None = None

    def range(self) -> tuple[float, float]:  # noqa: D102
        return self._range or (0.0, 0.0)

    def _observe(self, values: np.ndarray) -> None:
        lo, hi = float(values.min()), float(values.max())
        self._range = (lo, hi) if self._range is None else (min(lo, self._range[0]), max(hi, self._range[1]))


class PercentileObserver(Observer):
    """All but the same small share of values at either end: 99.99 keeps all but one in ten thousand at each.

    Values are counted by the upper half of their float32: bins of relative width 1/128, at every magnitude, so
    that one enormous outlier does not blur the rest.
    """

    def __init__(self, name: str, percentile: float = 99.99) -> None:
        super().__init__(name)
        self._share = 1 - percentile / 100
        self._counts = np.zeros(2**16, np.int64)
        self._extremes = MinMaxObserver(name)

    def range(self) -> tuple[float, float]:  # noqa: D102
        lo, hi = self._extremes.range()
        return max(lo, -self._upper(self._counts[2**15 :], -lo)), min(hi, self._upper(self._counts[: 2**15], hi))

    def _observe(self, values: np.ndarray) -> None:
        self._extremes._observe(values)
        self._counts += np.bincount(values.view(np.uint32) >> 16, minlength=2**16)

    def _upper(self, counts: np.ndarray, largest: float) -> float:
        """The magnitude that the allowed share of all values exceeds, among the values of one sign."""
        allowed = self._counts.sum() * self._share
        above = counts[::-1].cumsum()[::-1]  # values in this bin or beyond
        if above[0] <= allowed:
            return 0.0
        index = int(np.flatnonzero(above > allowed)[-1])
        left, right = np.array([index, index + 1], np.uint32).__lshift__(16).view(np.float32).astype(np.float64)
        inside = (above[index] - allowed) / counts[index]
        return float(left + min(inside, 1.0) * (min(right, largest) - left)) if largest > left else float(left)


class Histogram:
    """Counts in bins ``[i * width, (i + 1) * width)``; ``width`` is a power of two and bin 0 starts at zero."""

    def __init__(self) -> None:
        self.width = 0.0
        self.first = 0  # the index of counts[0]
        self.counts = np.zeros(0, np.int64)
        self._lo, self._hi = math.inf, -math.inf

    def add(self, values: np.ndarray) -> None:
        """Count finite values, widening the bins so that all bins from the least value to the largest fit."""
        lo = self._lo = min(self._lo, float(values.min()))
        hi = self._hi = max(self._hi, float(values.max()))
        needed = max(hi - lo, abs(lo), abs(hi)) / (_BINS - 1)
        width = max(self.width, 2.0 ** math.ceil(math.log2(needed)) if needed > 0 else 2.0**-149)
        self._widen(width)
        index = np.floor(values.astype(np.float64) / width).astype(np.int64)
        first = int(index.min())
        self._cover(first, int(index.max()))
        counts = np.bincount(index - first)
        self.counts[first - self.first : first - self.first + counts.size] += counts

    def magnitudes(self) -> np.ndarray:
        """Counts of ``|x|``: bin ``i`` is ``[i * width, (i + 1) * width)``."""
        split = min(max(-self.first, 0), self.counts.size)
        negative, positive = self.counts[:split][::-1], self.counts[split:]
        result = np.zeros(max(-self.first, self.first + self.counts.size, 1), np.int64)
        start = max(self.first, 0)
        result[start : start + positive.size] += positive
        skip = max(-(self.first + self.counts.size), 0)
        result[skip : skip + negative.size] += negative
        return result

    def centres(self) -> np.ndarray:
        """The middle of each bin."""
        return (self.first + np.arange(self.counts.size) + 0.5) * self.width

    def _widen(self, width: float) -> None:
        """Merge bins until they have this width."""
        if self.counts.size and width > self.width:
            ratio = width / self.width
            index = np.floor((self.first + np.arange(self.counts.size)) / ratio).astype(np.int64)
            self.first = int(index[0])
            self.counts = np.bincount(index - self.first, self.counts).astype(np.int64)
        self.width = width

    def _cover(self, first: int, last: int) -> None:
        if not self.counts.size:
            self.first, self.counts = first, np.zeros(last - first + 1, np.int64)
            return
        before = max(self.first - first, 0)
        after = max(last - (self.first + self.counts.size - 1), 0)
        self.counts = np.pad(self.counts, (before, after))
        self.first -= before


class _HistogramObserver(Observer):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._histogram = Histogram()
        self._extremes = MinMaxObserver(name)

    def _observe(self, values: np.ndarray) -> None:
        self._extremes._observe(values)
        self._histogram.add(values)


class EntropyObserver(_HistogramObserver):
    """The clipping threshold that loses least information: the smallest Kullback-Leibler divergence between the
    distribution clipped and the same in as many levels as the quantized form has.

    S. Migacz, "8-bit inference with TensorRT", GPU Technology Conference 2017. Magnitudes are clipped; a tensor of
    one sign has all 256 levels on its side, else half.
    """

    def range(self) -> tuple[float, float]:  # noqa: D102
        lo, hi = self._extremes.range()
        if lo == hi:
            return lo, hi
        counts = self._histogram.magnitudes().astype(np.float64)
        if counts.size > 1:
            counts[0] = counts[1]  # the exact zeros that a ReLU leaves cost nothing at any threshold
        levels = _LEVELS if lo >= 0 or hi <= 0 else _LEVELS // 2
        candidates = [*range(levels, counts.size, 8), counts.size]
        best = min(candidates, key=lambda n: _divergence(counts, n, levels)) if counts.any() else counts.size
        threshold = best * self._histogram.width
        return max(lo, -threshold), min(hi, threshold)


class MeanSquaredErrorObserver(_HistogramObserver):
    """The clipping range of least mean squared error between a value and its quantized form.

    Nagel et al., "A White Paper on Neural Network Quantization", arXiv:2106.08295, section 3.1.1. Each end is
    moved inwards in turn, the other held.
    """

    def range(self) -> tuple[float, float]:  # noqa: D102
        lo, hi = (min(self._extremes.range()[0], 0.0), max(self._extremes.range()[1], 0.0))
        if lo == hi:
            return self._extremes.range()
        kept = self._histogram.counts > 0
        centres, counts = self._histogram.centres()[kept], self._histogram.counts[kept]
        shares = np.geomspace(1, 1 / 64, 97)
        for _ in range(2):
            hi = min((hi * s for s in shares), key=lambda end: _squared_error(centres, counts, lo, end))
            lo = min((lo * s for s in shares), key=lambda end: _squared_error(centres, counts, end, hi))
        return lo, hi


def _divergence(counts: np.ndarray, kept: int, levels: int) -> float:
    """KL divergence between ``counts`` clipped to the first ``kept`` bins and the same in ``levels`` levels."""
    clipped = counts[:kept].copy()
    clipped[-1] += counts[kept:].sum()
    level = np.arange(kept) * levels // kept
    occupied = counts[:kept] > 0
    total = np.bincount(level, counts[:kept], levels)
    members = np.bincount(level, occupied, levels)
    spread = np.where(occupied, (total / np.maximum(members, 1))[level], 0)
    if clipped.sum() == 0 or spread.sum() == 0:
        return math.inf
    p, q = clipped / clipped.sum(), spread / spread.sum()
    seen = p > 0
    if (q[seen] == 0).any():  # only the last bin can be: what was clipped fell where nothing was
        q = np.maximum(q, 1e-9)
    return float((p[seen] * np.log(p[seen] / q[seen])).sum())


def _squared_error(values: np.ndarray, counts: np.ndarray, lo: float, hi: float) -> float:
    scale, zero_point = affine_uint8(lo, hi)
    q = np.clip(np.rint(values / scale), -zero_point, _LEVELS - 1 - zero_point)
    return float((counts * np.square(values - q * scale)).sum())


OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMaxObserver,
    "percentile": PercentileObserver,
    "entropy": EntropyObserver,
    "mse": MeanSquaredErrorObserver,
}
