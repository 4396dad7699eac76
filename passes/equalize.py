"""A pass that gives the channels of a tensor one range, so that one scale for all of them wastes no bits.

A tensor has one scale, and its widest channel sets it: a channel with a hundredth of that range is left with two
or three of the 256 values. Where only layers read the tensor, a channel can be stored larger by any factor: its
producer's weights and bias are multiplied by it, its readers' weights for that channel divided by it.

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (arXiv 1906.04721),
with ranges of activations seen on samples in place of the ranges of the producer's weights: those have a scale
for each output channel, and need no equal ranges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from math import ceil

import numpy as np
import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.module import layers_of, weights_of, with_layers, with_weights
from pumice.passes.calibrate import Samples
from pumice.passes.dataflow import Dataflow
from pumice.passes.evaluate import Evaluator
from pumice.passes.layers import Layer, find_layers
from pumice.passes.numpy_operators import plain
from pumice.passes.quantization_plan import QuantizeSpec, plan_quantization
from pumice.passes.rewriting import shape_of

# f(t x) = t f(x) for every t > 0, channel by channel. So is clip(0, hi), as far as t x stays below hi.
_HOMOGENEOUS = {"nn.relu", "nn.leakyrelu"}
_POOLS = {"nn.max_pool2d", "nn.avg_pool2d", "nn.adaptive_avg_pool2d"}

# A channel 64 times narrower than the widest still has 4 of 256 values. One narrower than that was hardly active
# on the samples, and may be far more so on other inputs, which a larger factor would saturate.
_LARGEST_FACTOR = 64.0


@tvm.transform.module_pass(opt_level=0, name="EqualizeChannels")
class EqualizeChannels:
    """Scale channels between float layers so that the channels of a tensor reach more nearly the same magnitude.

    Before::

        y = relu(conv2d(x, w) + b)
        z = conv2d(y, v)

    After, for a factor ``t >= 1`` per channel of ``y``::

        y = relu(conv2d(x, w * t) + b * t)
        z = conv2d(y, v / t)

    Where only depthwise layers read ``y``, ``t`` makes all ranges equal; elsewhere it is the square root of that
    (see ``Stream.share``). Across residual adds the same holds: all tensors that an add joins share their factors.

    The graph stays as it is, zero weights stay zero, and what the model computes is the same up to rounding, with
    one exception: behind ``clip(0, hi)`` a channel is from now on clipped above what it reached on the samples, and
    where its range became equal to the widest that is exactly there, where calibration would cut it off as well.
    Tensors that anything but layers, ReLUs, pools and residual adds reads, and layers that share weights, are left
    alone.

    ``samples`` are as for ``Calibrate``; at most ``limit`` of them, evenly spread, are run. Raises ModelError
    where they do not fit the model.
    """

    def __init__(self, samples: Mapping[str, np.ndarray], limit: int = 256) -> None:
        self.samples = samples
        self.limit = limit

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Run the samples, scale the weights."""
        graph = Dataflow(mod)
        rounded = plan_quantization(mod, QuantizeSpec()).tensors
        streams = [stream for stream in find_streams(mod, graph) if stream.watch(rounded)]
        if not streams:
            return mod
        maxima = self._maxima(mod, streams)
        weights = dict(weights_of(mod))
        records = layers_of(mod)
        for stream in streams:
            factors = channel_factors(stream, maxima)
            if np.all(factors == 1):
                continue
            for layer in stream.producers:
                for name, axis in produced(graph, layer):
                    weights[name] = scaled(weights[name], factors, axis)
                if layer.name in records:
                    records[layer.name].notes.append(_note(factors))
            for layer in stream.consumers:
                weights[layer.weight.name] = divided(layer, weights[layer.weight.name], factors)
        return with_layers(with_weights(mod, weights), records)

    def _maxima(self, mod: IRModule, streams: list[Stream]) -> dict[relax.Var, np.ndarray]:
        """The largest magnitude of each channel of the watched tensors."""
        axes = {tensor: stream.axis for stream in streams for tensor in stream.watched}
        maxima: dict[relax.Var, np.ndarray] = {}
        evaluator = Evaluator(mod, list(axes))
        samples = Samples(mod, self.samples)
        for sample in islice(samples, 0, None, ceil(len(samples) / self.limit)):
            for tensor, value in zip(axes, evaluator.observe(sample), strict=True):
                others = tuple(i for i in range(value.ndim) if i != axes[tensor])
                largest = np.abs(value).max(others, initial=0)
                maxima[tensor] = np.maximum(maxima.get(tensor, 0), largest)
        return maxima


@dataclass
class Stream:
    """Tensors whose channels must share their factors, and the layers that write and read them."""

    axis: int
    tensors: list[relax.Var] = field(default_factory=list)
    producers: list[Layer] = field(default_factory=list)
    consumers: list[Layer] = field(default_factory=list)
    limits: dict[relax.Var, float] = field(default_factory=dict)  # the results of clip(0, hi), with hi
    rounded: list[relax.Var] = field(default_factory=list)  # the tensors that quantization will round

    @property
    def share(self) -> float:
        """How much of the way to equal ranges it pays to go, as an exponent of the factors.

        A depthwise layer's weights have a scale for each channel, so dividing them costs nothing. Other readers
        share one scale among all channels of a row, and the noise that rounding it makes grows with the channels'
        factors: there the square root leaves activations and weights equally uneven.
        """
        return 1.0 if all(_reads_one_channel(layer) for layer in self.consumers) else 0.5

    def watch(self, rounded: list[relax.Var]) -> bool:
        """Keep which tensors will be rounded; false where none will be, and there is nothing to gain."""
        self.rounded = [tensor for tensor in self.tensors if tensor in rounded]
        return bool(self.rounded)

    @property
    def watched(self) -> list[relax.Var]:
        """The tensors whose maxima decide about the factors."""
        return list(dict.fromkeys([*self.rounded, *self.limits]))


def channel_factors(stream: Stream, maxima: Mapping[relax.Var, np.ndarray]) -> np.ndarray:
    """The factor of each channel, in [1, 64]; 1 for a channel that was never active.

    Each tensor's range is taken relative to its widest channel; over several tensors it is the geometric mean.
    """
    ranges = np.stack([maxima[tensor] for tensor in stream.rounded]).astype(np.float64)
    alive = (ranges > 0).all(0) & np.isfinite(ranges).all(0)
    factors = np.ones(ranges.shape[1])
    if not alive.any():
        return factors
    relative = np.log(ranges[:, alive] / ranges[:, alive].max(1, keepdims=True)).mean(0)
    factors[alive] = np.minimum(np.exp(stream.share * (relative.max() - relative)), _LARGEST_FACTOR)
    for tensor, high in stream.limits.items():
        with np.errstate(divide="ignore"):
            factors = np.minimum(factors, high / maxima[tensor])
    return np.maximum(factors, 1)


def scaled(array: np.ndarray, factors: np.ndarray, axis: int) -> np.ndarray:
    """``array`` times a factor for each index along ``axis``, in float32."""
    shape = [1] * array.ndim
    shape[axis] = -1
    result: np.ndarray = (array * factors.reshape(shape)).astype(np.float32)
    return result


def divided(layer: Layer, weight: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The weight of a layer whose input channels have become larger by ``factors``."""
    if layer.operator == "linear":
        return scaled(weight, 1 / factors, 0)
    outputs, inputs = weight.shape[:2]
    groups = len(factors) // inputs
    of_output = np.repeat(factors.reshape(groups, inputs), outputs // groups, axis=0)
    result: np.ndarray = (weight / of_output[:, :, None, None]).astype(np.float32)
    return result


def find_streams(mod: IRModule, graph: Dataflow) -> list[Stream]:
    """The groups of tensors whose channels may be scaled, in execution order."""
    layers = {layer.var: layer for layer in find_layers(mod) if is_scalable(layer, graph)}
    joined = _Joined()
    for var in graph.order:
        if var in graph.inputs or var in graph.outputs:
            joined.exclude(var)
        if var in graph.value and var in graph.activations:
            _visit(var, graph, layers, joined)
    excluded, axes = joined.excluded(), joined.axes()
    streams: dict[relax.Var, Stream] = {}
    for var in graph.order:
        root = joined.find(var)
        if var in graph.activations and root not in excluded and len(axes.get(root, ())) == 1:
            stream = streams.setdefault(root, Stream(next(iter(axes[root]))))
            stream.tensors.append(var)
            if graph.op(var) == "clip":
                stream.limits[var] = _bounds(graph, var)[1]
    for layer in layers.values():
        for var, role in ((layer.var, "producers"), (layer.data, "consumers")):
            if joined.find(var) in streams:
                getattr(streams[joined.find(var)], role).append(layer)
    return [stream for stream in streams.values() if stream.consumers]


def _visit(var: relax.Var, graph: Dataflow, layers: dict[relax.Var, Layer], joined: _Joined) -> None:
    """Join ``var`` with the operands that must share its factors, or exclude both."""
    operator, operands = graph.op(var), graph.activation_operands(var)
    if var in layers:
        rank = len(shape_of(var))
        axis = 1 if layers[var].operator == "conv2d" else rank - 1
        joined.has_axis(var, axis)
        joined.has_axis(layers[var].data, axis)
    elif operator in _HOMOGENEOUS or (operator == "clip" and _bounds(graph, var)[0] == 0):
        joined.join(var, operands[0])
    elif operator in _POOLS and str(graph.value[var].attrs.layout) == "NCHW":
        joined.join(var, operands[0])
        joined.has_axis(var, 1)
    elif operator == "add" and operands[0] in layers and graph.biased(operands[0]) == var:
        joined.join(var, operands[0])
    elif operator == "add" and len(operands) == 2 and all(_same_shape(var, operand) for operand in operands):
        joined.join(var, operands[0])
        joined.join(var, operands[1])
    else:
        for tensor in (var, *operands):
            joined.exclude(tensor)


class _Joined:
    """Disjoint sets of tensors; a set is excluded as a whole."""

    def __init__(self) -> None:
        self._parent: dict[relax.Var, relax.Var] = {}
        self._excluded: list[relax.Var] = []
        self._axes: list[tuple[relax.Var, int]] = []

    def find(self, var: relax.Var) -> relax.Var:
        while self._parent.get(var, var) != var:
            var = self._parent[var]
        return var

    def join(self, a: relax.Var, b: relax.Var) -> None:
        self._parent[self.find(a)] = self.find(b)

    def exclude(self, var: relax.Var) -> None:
        self._excluded.append(var)

    def has_axis(self, var: relax.Var, axis: int) -> None:
        self._axes.append((var, axis))

    def excluded(self) -> set[relax.Var]:
        """The representatives of the sets that hold an excluded tensor."""
        return {self.find(var) for var in self._excluded}

    def axes(self) -> dict[relax.Var, set[int]]:
        """Along which axes the layers around each set run over channels, by its representative."""
        found: dict[relax.Var, set[int]] = {}
        for var, axis in self._axes:
            found.setdefault(self.find(var), set()).add(axis)
        return found


def is_scalable(layer: Layer, graph: Dataflow) -> bool:
    """Whether a layer's weight and bias are its own, float, and can be changed."""
    if layer.weight_scale is not None or str(layer.weight.ty.dtype) != "float32":
        return False
    if layer.data not in graph.activations or graph.users[layer.weight] != [layer.var]:
        return False
    biased = graph.biased(layer.var)
    bias = graph.bias(biased, layer.var)
    return biased == layer.var or (isinstance(bias, relax.Var) and graph.users[bias] == [biased])


def _reads_one_channel(layer: Layer) -> bool:
    """Whether each output channel is made of a single input channel: depthwise."""
    return layer.operator == "conv2d" and shape_of(layer.weight)[1] == 1


def produced(graph: Dataflow, layer: Layer) -> list[tuple[str, int]]:
    """The weights that grow with the channels of a layer's output, and along which axis."""
    found = [(str(layer.weight.name), layer.channel_axis)]
    bias = graph.bias(graph.biased(layer.var), layer.var)
    if isinstance(bias, relax.Var):
        shape = shape_of(bias)
        found.append((str(bias.name), shape.index(max(shape))))
    return found


def _bounds(graph: Dataflow, clip: relax.Var) -> tuple[float, float]:
    low, high = (float(plain(bound)) for bound in graph.value[clip].args[1:3])
    return low, high


def _same_shape(a: relax.Var, b: relax.Var) -> bool:
    return shape_of(a) == shape_of(b)


def _note(factors: np.ndarray) -> str:
    return f"output channels equalized: scaled by up to {factors.max():.3g}, median {np.median(factors):.3g}"
