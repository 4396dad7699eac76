"""What rewriting passes ask of an activation: is it a layer's output, and is an operand one number a channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import relax

from pumice.passes.rewriting import Rewriter, op_name, shape_of

_CONVOLUTIONS = {"nn.conv1d": ("NCW", "OIW"), "nn.conv2d": ("NCHW", "OIHW")}


@dataclass(frozen=True)
class LayerOutput:
    """``layer`` or ``add(layer, bias)``, during a rewriting walk."""

    layer: relax.Call
    weight: str  # the name of its parameter
    weight_value: np.ndarray | None  # None while it is quantized
    bias: np.ndarray | None  # one float64 for each channel
    bias_name: str  # <layer>.bias where there is none yet
    shape: tuple[int, ...]  # of the output
    channel_axis: int  # of the output
    exclusive: bool  # whether nothing else reads the layer's result, before or after the bias


def layer_output(rw: Rewriter, expr: relax.Expr) -> LayerOutput | None:
    """The layer that ``expr`` is the output of, seen through a bias."""
    layer, bias = _layer(rw, expr), None
    exclusive = rw.uses(expr) == 1
    if layer is None:
        total = rw.call(expr, "add")
        if total is None:
            return None
        layer, bias = _layer(rw, total.args[0]), total.args[1]
        exclusive = exclusive and rw.uses(total.args[0]) == 1
        if layer is None:
            return None
    shape = shape_of(expr)
    channel_axis = len(shape) - 1 if op_name(layer) == "relax.matmul" else 1
    bias_value = None if bias is None else per_channel(rw, bias, shape, channel_axis)
    if bias is not None and bias_value is None:
        return None
    weight = _weight_parameter(rw, layer)
    value = rw.array(weight) if weight.same_as(layer.args[1]) else None
    if value is not None and not np.issubdtype(value.dtype, np.floating):
        value = None
    name = weight.name if rw.is_weight(weight) else "layer"
    bias_name = bias.name if bias is not None and rw.is_weight(bias) else f"{name.removesuffix('.weight')}.bias"
    return LayerOutput(layer, name, value, bias_value, bias_name, shape, channel_axis, exclusive)


def per_channel(rw: Rewriter, operand: relax.Expr, shape: tuple[int, ...], axis: int) -> np.ndarray | None:
    """A known operand of an elementwise operator as one float64 for each channel; None if it is not that."""
    value = rw.array(operand)
    if value is None or value.ndim > len(shape) or not np.issubdtype(value.dtype, np.floating):
        return None
    full = (1,) * (len(shape) - value.ndim) + value.shape
    if any(d != 1 for i, d in enumerate(full) if i != axis):
        return None
    return np.broadcast_to(value.astype(np.float64).reshape(-1), (shape[axis],))


def bias_shape(layer: relax.Call) -> tuple[int, ...]:
    """The canonical shape of a layer's bias: [N] for matmul, [1, N, 1, 1] for conv2d; -1 stands for N."""
    if op_name(layer) == "relax.matmul":
        return (-1,)
    return (1, -1) + (1,) * (len(shape_of(layer.args[0])) - 2)


def _layer(rw: Rewriter, expr: relax.Expr) -> relax.Call | None:
    call = rw.call(expr, "nn.conv1d", "nn.conv2d", "matmul")
    if call is None or rw.array(_weight_parameter(rw, call)) is None:
        return None
    if op_name(call) == "relax.matmul":
        return call if len(shape_of(call.args[1])) == 2 and len(shape_of(call.args[0])) > 1 else None
    layouts = _CONVOLUTIONS[op_name(call).removeprefix("relax.")]
    plain = (call.attrs.data_layout, call.attrs.kernel_layout) == layouts
    return call if plain and call.attrs.out_layout in ("", layouts[0]) else None


def _weight_parameter(rw: Rewriter, layer: relax.Call) -> relax.Expr:
    dequantized = rw.call(layer.args[1], "dequantize")
    return layer.args[1] if dequantized is None else dequantized.args[0]
