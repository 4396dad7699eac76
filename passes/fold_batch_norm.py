"""A compiler pass that folds batch norm, and any other scale and shift of a layer's output, into the layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.errors import ModelError
from pumice.module import source_of
from pumice.passes.layer_outputs import LayerOutput, bias_shape, layer_output, per_channel
from pumice.passes.rewriting import Rewriter, dtype_of, is_tensor, op_name, rewrite, shape_of


@tvm.transform.module_pass(opt_level=0, name="pumice.FoldBatchNorm")
class FoldBatchNorm:
    """``batch_norm(layer(x, w) + b) -> layer(x, w * s) + (b * s + t)`` in inference.

    ``s = gamma / sqrt(variance + epsilon)``, ``t = beta - mean * s``, computed in float64. The decomposed form
    folds too: ``multiply``, ``divide``, ``add`` and ``subtract`` of a layer's output and one number a channel.

    A batch norm that has no layer right before it, or whose layer is read elsewhere, or whose layer's weight is
    int8 already, becomes ``x * s + t`` with two parameters named as gamma and beta were. It is never moved
    over the layer behind it, whose padding it would have to change. A zero weight stays exactly zero. The bias
    of a layer that had none is called ``<layer>.bias``.

    ``|gamma|`` of what was folded into a layer stays known, by the layer's weight: see ``norm_scales_of``.

    Raises ModelError where a variance is negative or the statistics are not finite.
    """

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Fold every batch norm, scale and shift."""
        scales = norm_scales_of(mod)

        def visit(rw: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            return _fold(rw, var, value, scales)

        return with_norm_scales(rewrite(mod, visit), scales)


_NORM_SCALES = "pumice.norm_scales"


def norm_scales_of(mod: IRModule) -> dict[str, np.ndarray]:
    """``|gamma|``, float32 ``[N]``, of the batch norm that was folded into a layer, by the name of its weight.

    What network slimming ranks the layer's output channels by (Liu et al., arXiv 1708.06519).
    """
    stored = mod.attrs[_NORM_SCALES] if mod.attrs and _NORM_SCALES in mod.attrs else {}
    return {str(name): tensor.numpy() for name, tensor in stored.items()}


def with_norm_scales(mod: IRModule, scales: Mapping[str, np.ndarray]) -> IRModule:
    """``mod`` with these scales."""
    if not scales:
        return mod
    return mod.with_attr(_NORM_SCALES, {name: tvm.runtime.tensor(scale) for name, scale in scales.items()})


@dataclass(frozen=True)
class _Affine:
    """``data * scale + shift``, one number a channel of ``data``."""

    data: relax.Expr
    axis: int
    scale: np.ndarray
    shift: np.ndarray


def _fold(rw: Rewriter, var: relax.Var, value: relax.Expr, scales: dict[str, np.ndarray]) -> relax.Expr | None:
    normalized = rw.item(value, 0, "nn.batch_norm")
    if normalized is not None:
        affine = _batch_norm(rw, var, normalized)
        if affine is None:
            return None
        output = layer_output(rw, affine.data)
        folded = _into_layer(rw, affine, output)
        gamma = rw.array(normalized.args[1])
        if folded is not None and output is not None and gamma is not None and normalized.attrs.scale:
            scales[output.weight] = np.abs(gamma).astype(np.float32)
        return _as_multiply_add(rw, normalized, affine) if folded is None else folded
    elementwise = _elementwise(rw, var, value)
    return None if elementwise is None else _into_layer(rw, *elementwise)


def _batch_norm(rw: Rewriter, var: relax.Var, call: relax.Call) -> _Affine | None:
    arrays = [rw.array(arg) for arg in call.args[1:]]
    if call.attrs.training or any(a is None for a in arrays) or not is_tensor(call.args[0]):
        return None
    gamma, beta, mean, variance = (np.asarray(a, np.float64) for a in arrays)
    with np.errstate(all="ignore"):
        scale = 1 / np.sqrt(variance + call.attrs.epsilon)
        if call.attrs.scale:
            scale = gamma * scale
        shift = (beta if call.attrs.center else 0) - mean * scale
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        channel = int(np.argmin(np.isfinite(scale) & np.isfinite(shift)))
        raise ModelError(
            f"{source_of(rw.mod)}: the batch norm that computes {var.name} is not finite in channel {channel} "
            f"(variance {variance[channel]:g}, mean {mean[channel]:g}); the checkpoint is damaged"
        )
    axis = int(call.attrs.axis) % len(shape_of(call.args[0]))
    return _Affine(call.args[0], axis, scale, shift)


def _elementwise(rw: Rewriter, var: relax.Var, value: relax.Expr) -> tuple[_Affine, LayerOutput] | None:
    """A layer's output times, over, plus or minus one number a channel."""
    operator = op_name(value).removeprefix("relax.")
    if operator not in ("multiply", "divide", "add", "subtract"):
        return None
    for data, operand in (value.args, value.args[::-1]):
        output = layer_output(rw, data)
        if output is None or shape_of(var) != output.shape:
            continue
        number = per_channel(rw, operand, output.shape, output.channel_axis)
        reversed_order = data.same_as(value.args[1])
        if number is None or (operator == "divide" and (reversed_order or not number.all())):
            return None
        if operator == "add" and output.bias is None:
            return None  # the bias itself
        ones, zeros = np.ones_like(number), np.zeros_like(number)
        scale, shift = {
            "multiply": (number, zeros),
            "divide": (1 / np.where(number == 0, 1, number), zeros),
            "add": (ones, number),
            "subtract": (-ones, number) if reversed_order else (ones, -number),
        }[operator]
        return _Affine(data, output.channel_axis, scale, shift), output
    return None


def _into_layer(rw: Rewriter, affine: _Affine, output: LayerOutput | None) -> relax.Expr | None:
    if output is None or not output.exclusive or output.channel_axis != affine.axis:
        return None
    layer = output.layer
    bias = affine.shift if output.bias is None else output.bias * affine.scale + affine.shift
    if not (affine.scale == 1).all():
        if output.weight_value is None:
            return None
        weight = rw.weight(output.weight, _scaled(output.weight_value, layer, affine.scale))
        layer = relax.Call(layer.op, [layer.args[0], weight], layer.attrs)
    result = rw.emit(layer, "layer")
    if output.bias is None and not bias.any():
        return result
    value = bias.astype(dtype_of(affine.data)).reshape(bias_shape(layer))
    return relax.op.add(result, rw.weight(output.bias_name, value))


def _scaled(weight: np.ndarray, layer: relax.Call, scale: np.ndarray) -> np.ndarray:
    shape = [1] * weight.ndim
    shape[1 if op_name(layer) == "relax.matmul" else 0] = -1
    return np.asarray((weight.astype(np.float64) * scale.reshape(shape)).astype(weight.dtype))


def _as_multiply_add(rw: Rewriter, call: relax.Call, affine: _Affine) -> relax.Expr:
    shape = [1] * len(shape_of(affine.data))
    shape[affine.axis] = -1
    scale_name, shift_name = _parameter_names(rw, call.args[1:])
    dtype = dtype_of(affine.data)
    scale = rw.weight(scale_name, affine.scale.astype(dtype).reshape(shape))
    shift = rw.weight(shift_name, affine.shift.astype(dtype).reshape(shape))
    return relax.op.add(rw.emit(relax.op.multiply(affine.data, scale), "scaled"), shift)


def _parameter_names(rw: Rewriter, parameters: Sequence[relax.Expr]) -> tuple[str, str]:
    """Names for scale and shift: gamma's and beta's, or made from what is there."""
    names = [p.name if rw.is_weight(p) else "" for p in parameters]
    base = next((n.rpartition(".")[0] or n for n in names if n), "batch_norm")
    return names[0] or f"{base}.weight", names[1] or f"{base}.bias"
