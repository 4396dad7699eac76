"""A pass that takes the mean of what rounding the weights did to a layer out of its bias."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from math import ceil

import numpy as np
import tvm
from tvm import relax
from tvm.ir import IRModule
from tvm.relax.op import add

from pumice.module import weights_of
from pumice.passes.calibrate import Samples
from pumice.passes.dataflow import Dataflow
from pumice.passes.evaluate import SharedEvaluator
from pumice.passes.layers import Layer, find_layers
from pumice.passes.quantization_plan import accumulator_bound
from pumice.passes.rewriting import Rewriter, array_of, rewrite, shape_of

_DONE = "pumice.bias_corrected"


@tvm.transform.module_pass(opt_level=0, name="CorrectBias")
class CorrectBias:
    """Shift each int8 layer's bias so that its mean output on samples is the float layer's.

    Before, with ``W`` the float weight that ``w`` was rounded from::

        y = conv2d(x, dequantize(w, w.scale, 0)) + b

    After::

        y = conv2d(x, dequantize(w, w.scale, 0)) + (b - mean(conv2d(x, w * w.scale - W)))

    The mean is per output channel, over samples and positions, for the layer's input in the float module. It is
    exact at padded borders too: a convolution is linear, so the mean image goes through it in place of the images.
    A layer without bias gets one. Layers on sequences ``[batch, tokens, C]`` are left as they are: their mean is over
    padding tokens too, which nobody reads, and on a sentence encoder that cost more than it gained. A module is
    corrected once: on one that was, the pass does nothing.

    ``original`` is the float module that was quantized, with the same layers; ``samples`` are as for ``Calibrate``,
    of which at most ``limit``, evenly spread, are run. Raises ModelError where they do not fit the model.

    Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (arXiv 1906.04721),
    section 4.2, with means seen on samples in place of those that batch norm predicts.
    """

    def __init__(
        self,
        original: IRModule,
        samples: Mapping[str, np.ndarray],
        limit: int = 256,
        evaluator: SharedEvaluator | None = None,
    ) -> None:
        """``evaluator`` is what other passes run ``original`` with."""
        self.original = original
        self.samples = samples
        self.limit = limit
        self.evaluator = evaluator or SharedEvaluator()

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Measure the means, rewrite the biases."""
        if mod.attrs and _DONE in mod.attrs:
            return mod
        floats = {layer.name: layer for layer in find_layers(self.original) if layer.weight_scale is None}
        graph = Dataflow(mod)
        int8 = [layer for layer in find_layers(mod) if _is_corrected(layer, graph) and layer.name in floats]
        if not int8:
            return mod
        inputs = self._mean_inputs([floats[layer.name] for layer in int8])
        before, after = weights_of(self.original), weights_of(mod)
        shifts = {}
        for layer, mean in zip(int8, inputs, strict=True):
            rounded = _dequantized(layer, graph, after)
            error = rounded - before[floats[layer.name].weight.name].astype(np.float64)
            shifts[layer.var] = -mean_output(layer, error, mean)
        return rewrite(mod, _Corrector(graph, int8, shifts, after).visit).with_attr(_DONE, True)

    def _mean_inputs(self, layers: list[Layer]) -> list[np.ndarray]:
        """The mean of each layer's input over the samples, in the input's shape."""
        data = [layer.data for layer in layers]
        distinct = list(dict.fromkeys(data))
        evaluator = self.evaluator.of(self.original, distinct)
        samples = Samples(self.original, self.samples)
        chosen = list(islice(samples, 0, None, ceil(len(samples) / self.limit)))
        sums = [np.zeros(shape_of(var)) for var in distinct]
        for sample in chosen:
            for total, value in zip(sums, evaluator.observe(sample, distinct), strict=True):
                total += value
        return [sums[distinct.index(var)] / len(chosen) for var in data]


def mean_output(layer: Layer, weight: np.ndarray, data: np.ndarray) -> np.ndarray:
    """``[N]``: the layer's output for ``data``, with this weight, averaged over all but the output channels."""
    if layer.operator == "linear":
        result: np.ndarray = data.reshape(-1, data.shape[-1]).mean(0) @ weight
        return result
    attrs = layer.call.attrs
    top, left, bottom, right = (int(size) for size in attrs.padding)
    stride_y, stride_x = (int(step) for step in attrs.strides)
    dilation_y, dilation_x = (int(step) for step in attrs.dilation)
    height, width = shape_of(layer.var)[2:]
    padded = np.pad(data, ((0, 0), (0, 0), (top, bottom), (left, right)))
    outputs, inputs, taps_y, taps_x = weight.shape
    groups = int(attrs.groups)
    total = np.zeros((groups, outputs // groups))
    for y in range(taps_y):
        for x in range(taps_x):
            rows = slice(y * dilation_y, y * dilation_y + (height - 1) * stride_y + 1, stride_y)
            columns = slice(x * dilation_x, x * dilation_x + (width - 1) * stride_x + 1, stride_x)
            seen = padded[:, :, rows, columns].mean((0, 2, 3)).reshape(groups, inputs)
            total += np.einsum("goi,gi->go", weight[:, :, y, x].reshape(groups, -1, inputs), seen)
    return total.reshape(-1)


class _Corrector:
    """Adds to each bias, or makes one."""

    def __init__(
        self,
        graph: Dataflow,
        layers: list[Layer],
        shifts: Mapping[relax.Var, np.ndarray],
        weights: Mapping[str, np.ndarray],
    ) -> None:
        self.graph = graph
        self.shifts = shifts
        self.weights = weights
        self.layers = {layer.var: layer for layer in layers}
        self.biased = {graph.biased(layer.var): layer for layer in layers}

    def visit(self, rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        """Let the binding that ends a layer add the corrected bias."""
        layer = self.biased.get(var)
        if layer is None:
            return None
        old = self.graph.bias(var, layer.var)
        shape = self._shape(layer) if old is None else list(shape_of(old))
        bias = self._corrected(layer, old).astype(np.float32).reshape(shape)
        name = old.name if isinstance(old, relax.Var) else f"{layer.name}.bias"
        computed = rewriter.emit(value) if old is None else self._computed(value, old)
        return add(computed, rewriter.weight(name, bias))

    def _corrected(self, layer: Layer, old: relax.Expr | None) -> np.ndarray:
        """The new bias, but the old one where the accumulator has no room for the new beside the products."""
        shift = self.shifts[layer.var]
        bias = np.zeros_like(shift) if old is None else array_of(old, self.weights).astype(np.float64).reshape(-1)
        scale = array_of(self.graph.value[layer.data].args[1], self.weights).astype(np.float64)
        unit = scale.reshape(-1) * array_of(layer.weight_scale, self.weights).astype(np.float64).reshape(-1)
        room = 2**31 - 1 - accumulator_bound(layer, self.weights[layer.weight.name])
        return np.where(np.abs(bias + shift) < unit * room, bias + shift, bias)

    @staticmethod
    def _computed(value: relax.Expr, old: relax.Expr) -> relax.Expr:
        """The operand of an add that is not the bias."""
        return next(argument for argument in value.args if not argument.same_as(old))

    @staticmethod
    def _shape(layer: Layer) -> list[int]:
        result = list(shape_of(layer.var))
        return [1, result[1], 1, 1] if layer.operator == "conv2d" else result[-1:]


def _is_corrected(layer: Layer, graph: Dataflow) -> bool:
    """Whether a layer computes in int8, from bytes with one scale, and on what has a meaningful mean."""
    if layer.weight_scale is None or graph.op(layer.data) != "dequantize":
        return False
    if len(shape_of(layer.data)) == 3:
        return False
    return int(np.prod(shape_of(graph.value[layer.data].args[1]))) == 1


def _dequantized(layer: Layer, graph: Dataflow, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """The weight that an int8 layer computes with, as float64."""
    stored = weights[layer.weight.name].astype(np.float64)
    shape = [1] * stored.ndim
    shape[layer.channel_axis] = -1
    call = graph.value[layer.call.args[1]]
    scale, zero_point = (array_of(operand, weights).astype(np.float64).reshape(-1) for operand in call.args[1:3])
    result: np.ndarray = (stored - zero_point.reshape(shape)) * scale.reshape(shape)
    return result
