"""A pass that turns a calibrated float module to int8, as quantize and dequantize operators around each layer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm
from tvm import relax
from tvm.ir import IRModule
from tvm.relax.op import dequantize, quantize

from pumice.errors import ModelError
from pumice.module import layers_of, source_of, weights_of, with_layers
from pumice.passes.calibrate import Affine, ranges_of, without_ranges
from pumice.passes.dataflow import Dataflow, operands, substitute
from pumice.passes.layers import Layer, find_layers
from pumice.passes.quantization_plan import (
    POINTWISE,
    QuantizationPlan,
    QuantizeSpec,
    accumulator_bound,
    plan_quantization,
    quantize_rows,
    symmetric_scale,
    weight_scales_of,
    with_weight_scales,
)
from pumice.passes.rewriting import Rewriter, array_of, rewrite
from pumice.record import LayerRecord

_BIAS_LIMIT = 2**30  # a bias in units of the accumulator
_EXACT_BIAS = 2**23  # ... whose float32 is exact, for a channel with no weights


@tvm.transform.module_pass(opt_level=0, name="Quantize")
class Quantize:
    """Put quantize and dequantize around what will compute in int8; layers already quantized stay as they are.

    Before, calibrated::

        y = nn.conv2d(x, w)                     w: float32 [O, I, kh, kw]

    After::

        xq = quantize(x, sx, zx)                uint8, per tensor
        xd = dequantize(xq, sx, zx)
        wd = dequantize(w, w.scale, 0, axis=0)  w: int8 in [-127, 127], w.scale: float32 [O]
        y = nn.conv2d(xd, wd)

    Zero weights stay zero. Raises ModelError where a layer is to be quantized and the module is not calibrated.
    """

    def __init__(self, spec: QuantizeSpec | None = None) -> None:
        self.spec = spec or QuantizeSpec()

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Quantize ``main``."""
        plan = plan_quantization(mod, self.spec)
        ranges = ranges_of(mod)
        if plan.layers and not ranges:
            raise ModelError(
                f"{source_of(mod)}: layer {plan.layers[0].name} cannot be quantized without calibration data; "
                "give some, or compile without quantization"
            )
        quantized = rewrite(mod, _Quantizer(mod, plan, ranges).visit) if plan.layers else mod
        return with_weight_scales(without_ranges(_record(quantized, plan)), {})


class _Quantizer:
    """Emits each tensor's bytes where they are first read, and each weight's where it is first used."""

    def __init__(self, mod: IRModule, plan: QuantizationPlan, ranges: Mapping[str, Affine]) -> None:
        self.graph = Dataflow(mod)
        self.plan = plan
        self.ranges = {var: self._range(mod, ranges, var) for var in plan.tensors}
        self.rounded = weight_scales_of(mod)
        self.weights = self._quantize_weights(weights_of(mod))
        self.layers = {layer.var: layer for layer in plan.layers}
        self.dequantized: dict[relax.Var, relax.Expr] = {}

    def visit(self, rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        """Let the binding read bytes where the plan says so."""
        replacement = {}
        for before, now in zip(operands(self.graph.value[var]), operands(value), strict=True):
            if before in self.ranges and self.plan.reads_quantized(before, var):
                replacement[now] = self._tensor(rewriter, before, now)
            elif before in self.weights and var in self.layers:
                replacement[now] = self._weight(rewriter, self.layers[var], before)
        return substitute(value, replacement) if replacement else None

    def _tensor(self, rewriter: Rewriter, before: relax.Var, now: relax.Var) -> relax.Expr:
        if before not in self.dequantized:
            affine = self.ranges[before]
            scale = relax.const(affine.scale, "float32")
            zero_point = relax.const(np.array(affine.zero_point, np.uint8), "uint8")
            q = rewriter.emit(quantize(now, scale, zero_point, out_dtype="uint8"), "q")
            self.dequantized[before] = rewriter.emit(dequantize(q, scale, zero_point), "dq")
        return self.dequantized[before]

    def _weight(self, rewriter: Rewriter, layer: Layer, before: relax.Var) -> relax.Expr:
        if before not in self.dequantized:
            values, scale = self.weights[before]
            w = rewriter.weight(before.name, values)
            w_scale = rewriter.weight(f"{before.name}.scale", scale)
            zero = relax.const(np.array(0, np.int8), "int8")
            self.dequantized[before] = rewriter.emit(dequantize(w, w_scale, zero, axis=layer.channel_axis), "w")
        return self.dequantized[before]

    def _range(self, mod: IRModule, ranges: Mapping[str, Affine], var: relax.Var) -> Affine:
        name = self.graph.names[var]
        if name not in ranges:
            raise ModelError(
                f"{source_of(mod)}: the calibration has no range for tensor {name!r}; "
                "calibrate after the last pass that changes the graph, and with the same layers kept float"
            )
        return ranges[name]

    def _quantize_weights(self, weights: dict[str, np.ndarray]) -> dict[relax.Var, tuple[np.ndarray, np.ndarray]]:
        """Each weight's int8 values and its scales."""
        quantized = {}
        for layer in self.plan.layers:
            if layer.weight not in quantized:
                weight = weights[layer.weight.name]
                scale = self._channel_scales(layer, weight, weights)
                quantized[layer.weight] = (quantize_rows(layer, weight, scale), scale)
        return quantized

    def _channel_scales(self, layer: Layer, weight: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
        """``max|w| / 127``, or what the weight was rounded by already, but no less than lets the bias fit.

        That is, the accumulator, beside the products. A channel that batch norm shut off has tiny weights and a plain
        bias. Where no weight is left the scale serves the bias alone.
        """
        known = self.rounded.get(layer.weight.name)
        scale = (symmetric_scale(layer, weight) if known is None else known).astype(np.float64)
        bound = accumulator_bound(layer, quantize_rows(layer, weight, scale))
        room = np.minimum(_BIAS_LIMIT, 2**31 - 1 - bound)
        silent = np.zeros_like(scale)
        for other in self.plan.layers:
            bias = self._bias(other, weights) if other.weight == layer.weight else None
            if bias is not None:
                in_units = np.abs(bias.astype(np.float64)) / self.ranges[other.data].scale
                scale = np.maximum(scale, in_units / room)
                silent = np.maximum(silent, in_units / _EXACT_BIAS)
        silent = np.where(silent > 0, np.maximum(silent, np.finfo(np.float32).tiny), 1)
        return np.where(bound == 0, silent, scale).astype(np.float32)

    def _bias(self, layer: Layer, weights: dict[str, np.ndarray]) -> np.ndarray | None:
        bias = self.graph.bias(self.graph.biased(layer.var), layer.var)
        if bias is None:
            return None
        value = array_of(bias, weights)
        return np.asarray(value).reshape(-1)


def _record(mod: IRModule, plan: QuantizationPlan) -> IRModule:
    """Write into each layer's record what it computes in, with which scales, or why it stays float."""
    graph = Dataflow(mod)
    weights = weights_of(mod)
    records = layers_of(mod)
    for layer in find_layers(mod):
        shape = tuple(int(d) for d in layer.weight.ty.shape)
        record = records.setdefault(
            layer.name, LayerRecord(layer.name, layer.operator, layer.weight.name, shape, layer.macs)
        )
        if layer.name in plan.float_reasons:
            record.dtype, record.reason = "float32", plan.float_reasons[layer.name]
            continue
        if layer.weight_scale is None or graph.op(layer.data) != "dequantize":
            continue
        record.dtype = "int8"
        record.input_scale, record.input_zero_point = _affine_of(graph.value[layer.data], weights)
        output = _output_bytes(graph, layer.var)
        if output is not None:
            record.output_scale, record.output_zero_point = _affine_of(output, weights)
    return with_layers(mod, records)


def _output_bytes(graph: Dataflow, var: relax.Var) -> relax.Call | None:
    """The quantize that ends the epilogue of a layer, None where its output stays float."""
    while True:
        users = graph.users[var]
        found = next((user for user in users if graph.op(user) == "quantize"), None)
        if found is not None:
            return graph.value[found]
        if len(users) != 1 or graph.op(users[0]) not in POINTWISE:
            return None
        var = users[0]


def _affine_of(call: relax.Call, weights: Mapping[str, np.ndarray]) -> tuple[float | None, int | None]:
    """Scale and zero point of a quantize or dequantize; None for one per channel."""
    scale, zero_point = (
        weights.get(value.name) if isinstance(value, relax.Var) else value.value.numpy() for value in call.args[1:3]
    )
    if scale is None or zero_point is None or scale.size != 1 or zero_point.size != 1:
        return None, None
    return float(scale.reshape(())), int(zero_point.reshape(()))
