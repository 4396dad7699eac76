"""A compiler pass that leaves one kind of convolution layer: conv2d with its padding in its attributes."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.passes.rewriting import Rewriter, op_name, rewrite, shape_of


@tvm.transform.module_pass(opt_level=0, name="pumice.CanonicalizeConv")
class CanonicalizeConv:
    """``conv1d(x, w) -> squeeze(conv2d(expand_dims(x), expand_dims(w)))`` with a height of one.

    ``conv2d(pad(x, 0), w) -> conv2d(x, w, padding)`` for zeros around height and width. What follows a conv1d
    (bias, activation, residual add, quantize) moves before the squeeze, so that a chain of conv1d layers becomes
    a chain of conv2d layers with nothing in between.
    """

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Rewrite every convolution."""
        return rewrite(mod, _canonicalize)


_HEIGHT = 2
_ELEMENTWISE = (
    *("nn.relu", "clip", "nn.gelu", "nn.gelu_tanh", "nn.silu", "nn.leakyrelu", "sigmoid", "tanh"),
    *("quantize", "dequantize"),
)
_BINARY = ("add", "subtract", "multiply")


def _canonicalize(rw: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
    operator = op_name(value).removeprefix("relax.")
    if operator in ("nn.conv1d", "nn.conv2d"):
        padded = _with_pad(rw, value)
        if operator == "nn.conv1d" and (value.attrs.data_layout, value.attrs.kernel_layout) == ("NCW", "OIW"):
            return _as_conv2d(rw, value if padded is None else padded)
        return padded
    if operator in _ELEMENTWISE:
        return _before_squeeze(rw, value)
    if operator in _BINARY:
        return _binary_before_squeeze(rw, value)
    return None


def _with_pad(rw: Rewriter, conv: relax.Call) -> relax.Call | None:
    pad = rw.call(conv.args[0], "nn.pad")
    if pad is None or pad.attrs.pad_mode != "constant" or float(pad.attrs.pad_value) != 0:
        return None
    if not conv.attrs.data_layout.startswith("NC"):
        return None
    widths = [int(w) for w in pad.attrs.pad_width]
    before, after = widths[0::2], widths[1::2]
    if any(before[:2]) or any(after[:2]) or min(widths) < 0:
        return None
    # The attribute lists all beginnings, then all ends: [top, left, bottom, right].
    padding = [int(p) + w for p, w in zip(conv.attrs.padding, before[2:] + after[2:], strict=True)]
    return _conv(conv, pad.args[0], conv.args[1], padding=padding)


def _conv(conv: relax.Call, data: relax.Expr, weight: relax.Expr, padding: list[int]) -> relax.Call:
    make = relax.op.nn.conv2d if op_name(conv) == "relax.nn.conv2d" else relax.op.nn.conv1d
    a = conv.attrs
    return make(
        *(data, weight, list(a.strides), padding, list(a.dilation), a.groups),
        *(a.data_layout, a.kernel_layout, a.out_layout, a.out_dtype),
    )


def _as_conv2d(rw: Rewriter, conv: relax.Call) -> relax.Expr:
    a = conv.attrs
    begin, end = (int(p) for p in a.padding)
    data = rw.emit(relax.op.expand_dims(conv.args[0], [_HEIGHT]), "rows")
    weight = rw.emit(relax.op.expand_dims(conv.args[1], [_HEIGHT]), "kernel")
    wide = relax.op.nn.conv2d(
        *(data, weight, [1, int(a.strides[0])], [0, begin, 0, end], [1, int(a.dilation[0])], a.groups),
        out_dtype=a.out_dtype,
    )
    return relax.op.squeeze(rw.emit(wide, "conv2d"), [_HEIGHT])


def _unsqueezed(rw: Rewriter, expr: relax.Expr) -> relax.Expr | None:
    """What is squeezed to ``expr``, if it is a map of height one."""
    squeeze = rw.call(expr, "squeeze")
    if squeeze is None or squeeze.attrs.axis is None or [int(x) for x in squeeze.attrs.axis] != [_HEIGHT]:
        return None
    return squeeze.args[0] if len(shape_of(squeeze.args[0])) == 4 else None


def _before_squeeze(rw: Rewriter, value: relax.Call) -> relax.Expr | None:
    inner = _unsqueezed(rw, value.args[0])
    if inner is None:
        return None
    if op_name(value) in ("relax.quantize", "relax.dequantize"):
        scale = rw.array(value.args[1])
        if scale is None or scale.size != 1:
            return None
    moved = relax.Call(value.op, [inner, *value.args[1:]], value.attrs, value.ty_args)
    return relax.op.squeeze(rw.emit(moved, "rows"), [_HEIGHT])


def _binary_before_squeeze(rw: Rewriter, value: relax.Call) -> relax.Expr | None:
    left, right = (_unsqueezed(rw, arg) for arg in value.args)
    operands = [left, right]
    for i, arg in enumerate(value.args):
        if operands[i] is None:
            operand = rw.array(arg)
            if operand is None or operand.ndim > 3:
                return None
            if operand.ndim > 1:  # [C, 1] and [1, C, 1] line up from the right: the height goes before the last
                operands[i] = rw.derived([arg], operand.reshape(*operand.shape[:-1], 1, operand.shape[-1]))
            else:
                operands[i] = arg
    if left is None and right is None:
        return None
    moved = relax.Call(value.op, operands, value.attrs, value.ty_args)
    return relax.op.squeeze(rw.emit(moved, "rows"), [_HEIGHT])
