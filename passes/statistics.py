"""What calibration samples tell about the inputs of layers: their second moments.

For a layer ``y = W x`` with second moments ``G = mean(x x^T)``, replacing ``W`` by ``V`` costs the mean squared error
``trace((W - V) G (W - V)^T)`` at its output. So everything that pruning and rounding weigh against each other, they
can weigh without running the model again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from tvm.ir import IRModule

from pumice.passes.calibrate import Samples
from pumice.passes.dataflow import Dataflow
from pumice.passes.evaluate import Evaluator
from pumice.passes.layers import Layer, find_layers
from pumice.passes.padding import real_positions, token_mask
from pumice.passes.rewriting import shape_of

_MOST_POSITIONS = 4096  # of one sample that are looked at; neighbours in a picture tell much the same


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's input, in the order of its weight's rows.

    gram: float64 ``[groups, K, K]``, the mean over positions of ``x x^T``, K = taps * C: what one output channel
    reads. A convolution in groups has one for each. mean: float64 ``[groups, K]``. count: positions seen.
    """

    gram: np.ndarray
    mean: np.ndarray
    count: int

    @property
    def mean_square(self) -> np.ndarray:
        """``[groups, K]``: the diagonal."""
        return np.diagonal(self.gram, axis1=1, axis2=2)

    def of_rows(self, count: int) -> np.ndarray:
        """Which gram each of ``count`` output channels reads: ``[count]``."""
        return np.arange(count) * len(self.gram) // count


def input_moments(
    mod: IRModule,
    samples: Mapping[str, np.ndarray],
    layers: Sequence[Layer] | None = None,
    limit: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Moments]:
    """The moments of the inputs of ``layers`` of ``mod`` (all, if None), by layer name.

    ``samples`` are as for ``Calibrate``; at most ``limit`` of them, evenly spread, are run. Positions that
    ``token_mask`` calls padding are left out, and of a large picture only a part of the positions counts. Raises
    ModelError where the samples do not fit the model, UnsupportedError where it cannot be run here.
    """
    computed = Dataflow(mod).activations
    chosen = [layer for layer in find_layers(mod) if layer.data in computed] if layers is None else list(layers)
    keys = {layer.name: _reading(layer) for layer in chosen}
    gatherers = {keys[layer.name]: _Gatherer(layer) for layer in chosen}  # Q, K and V have one between them
    tensors = list(dict.fromkeys(layer.data for layer in chosen))
    if not tensors:
        return {}
    evaluator, mask = Evaluator(mod, tensors, with_outputs=False), token_mask(mod)
    arrays = Samples(mod, samples)
    picked = list(islice(arrays, 0, None, math.ceil(len(arrays) / limit)))
    for done, sample in enumerate(picked, start=1):
        values = dict(zip(tensors, evaluator.observe(sample), strict=True))
        real = None if mask is None else np.asarray(sample[mask], bool)
        for gatherer in gatherers.values():
            gatherer.add(values[gatherer.layer.data], real)
        if progress is not None:
            progress(done, len(picked))
    found = {key: gatherer.moments() for key, gatherer in gatherers.items()}
    return {name: found[key] for name, key in keys.items()}


def output_error(before: np.ndarray, after: np.ndarray, moments: Moments) -> float:
    """The noise-to-signal ratio of a layer's output that computes with rows ``after`` in place of ``before``.

    Both are ``[N, taps, C]``. The bias is no part of the signal; a layer without any signal has the ratio 0.
    """
    signal = output_energy(before, moments)
    return output_energy(np.subtract(before, after, dtype=np.float64), moments) / signal if signal > 0 else 0.0


def output_energy(rows: np.ndarray, moments: Moments) -> float:
    """The mean energy of a layer's output, all channels together and without the bias: ``trace(W G W^T)``."""
    flat = rows.reshape(len(moments.gram), -1, moments.gram.shape[1]).astype(np.float64)
    return float(max(0.0, np.sum((flat @ moments.gram) * flat)))


def _reading(layer: Layer) -> tuple[object, ...]:
    """What a layer reads, and through which window: layers with the same have the same moments."""
    if layer.operator == "linear":
        return (layer.data,)
    attrs = layer.call.attrs
    window = [tuple(int(size) for size in sizes) for sizes in (attrs.padding, attrs.strides, attrs.dilation)]
    return (layer.data, shape_of(layer.weight)[2:], *window, int(attrs.groups))


class _Gatherer:
    """Sums up the moments of one layer's input."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        groups = int(layer.call.attrs.groups) if layer.operator == "conv2d" else 1
        taps, channels = layer.to_rows(np.empty(shape_of(layer.weight), np.bool_)).shape[1:]
        self._gram = np.zeros((groups, taps * channels, taps * channels))
        self._sum = np.zeros((groups, taps * channels))
        self._count = 0

    def add(self, value: np.ndarray, real: np.ndarray | None) -> None:
        """Take in the layer's input for one sample."""
        columns = self._columns(value, real)
        self._gram += columns.transpose(0, 2, 1) @ columns
        self._sum += columns.sum(1, dtype=np.float64)
        self._count += columns.shape[1]

    def moments(self) -> Moments:
        count = max(1, self._count)
        return Moments(self._gram / count, self._sum / count, self._count)

    def _columns(self, value: np.ndarray, real: np.ndarray | None) -> np.ndarray:
        """What one output position reads, for each position: float32 ``[groups, positions, K]``."""
        if self.layer.operator == "linear":
            return np.ascontiguousarray(real_positions(value, real))[None]
        return unfold(value, self.layer, len(self._gram), _MOST_POSITIONS)


def unfold(value: np.ndarray, layer: Layer, groups: int, limit: int | None = None) -> np.ndarray:
    """im2col: what each output position of a convolution reads of ``value`` NCHW: ``[groups, positions, taps * C]``.

    With a ``limit``, an even part of the positions, about as many.
    """
    attrs = layer.call.attrs
    top, left, bottom, right = (int(size) for size in attrs.padding)
    kernel = shape_of(layer.weight)[2:]
    dilation = [int(step) for step in attrs.dilation]
    spans = [(size - 1) * step + 1 for size, step in zip(kernel, dilation, strict=True)]
    padded = np.pad(value, ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = sliding_window_view(padded, spans, axis=(2, 3))
    stride_y, stride_x = (int(step) for step in attrs.strides)
    windows = windows[:, :, ::stride_y, ::stride_x, :: dilation[0], :: dilation[1]]
    batch, channels, height, width = windows.shape[:4]
    if limit is not None and batch * height * width > limit:
        step = math.ceil(math.sqrt(batch * height * width / limit))
        windows = windows[:, :, step // 2 :: step, step // 2 :: step]
    taps = int(np.prod(kernel))
    # batch, groups, C, y, x, taps -> groups, batch, y, x, taps, C
    split = windows.reshape(batch, groups, channels // groups, *windows.shape[2:4], taps)
    return split.transpose(1, 0, 3, 4, 5, 2).reshape(groups, -1, taps * (channels // groups))
