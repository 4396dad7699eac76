"""Lowering attention: the projections of its operands stay packed, and so does its result."""

from __future__ import annotations

import hashlib
import math

import numpy as np
from tvm import relax

from pumice.passes.fusion import RESHAPES, Quant
from pumice.passes.packed import Builder, Packed
from pumice.passes.rewriting import shape_of
from pumice.passes.views import View, head_layout, view
from pumice.schedules.attention import Attention, Bias, Heads, Requantize, attention
from pumice.schedules.cuda.attention import cuda_attention, fits
from pumice.schedules.geometry import Geometry
from pumice.schedules.layout import Packing, pack, unpack


def lower_attention(builder: Builder, var: relax.Var, call: relax.Call) -> bool:
    """One kernel for all heads; what hides the NaN of hidden rows and what quantizes the result goes with it."""
    shapes = [shape_of(argument) for argument in call.args]
    (batch, queries, count, size), value_size = shapes[0], shapes[2][3]
    if str(var.ty.dtype) != "float32" or any(0 in shape for shape in shapes):
        return False
    if call.attrs.causal_mask is not None or call.attrs.window_size is not None:
        return False
    if any(shape[2] != count for shape in shapes[1:3]):  # several heads of queries share one of keys
        return False
    (q, q_heads), (k, k_heads), (v, v_heads) = (_heads(builder, argument) for argument in call.args[:3])
    bias = _bias(builder, call.args[3], shapes[3]) if len(call.args) > 3 else None
    guard = _guard(builder, var, call)
    end, quant, between = _end(builder, var if guard is None else guard, value_size)
    readers = _readers(builder, end)
    geometry = Geometry.of_tokens(batch * queries)
    work = Attention(
        batch=batch,
        heads=count,
        head_size=size,
        value_size=value_size,
        scale=1 / math.sqrt(size) if call.attrs.scale is None else float(call.attrs.scale.value),
        q=q_heads,
        k=k_heads,
        v=v_heads,
        bias=None if bias is None else bias[1],
        guarded=guard is not None,
        requantize=None if quant is None else Requantize(float(np.float32(1 / quant.scale)), quant.zero_point),
        threads=builder.threads,
    )
    arguments = [q, k, v] + ([] if bias is None else [bias[0]])
    make = cuda_attention if builder.target.runs_on_gpu and fits(work) else attention
    dtype = "float32" if quant is None else "uint8"
    expr = builder.call(work, make, arguments, work.output_shape, dtype, "attention")
    packed = Packed(expr, count * value_size, geometry, quant)
    for reader in [*between, *readers]:
        builder.define(reader, packed)
    builder.set_plain(end, _plain(builder, packed, end))
    return True


def _end(builder: Builder, result: relax.Var, value_size: int) -> tuple[relax.Var, Quant | None, list[relax.Var]]:
    """The last value that the kernel makes, how it is quantized, and what it then skips.

    The last is ``result``, or its bytes dequantized again.
    """
    if value_size % 4:
        return result, None, []
    flow, graph = builder.graph.flow, builder.graph
    user = flow.only_user(result)
    if user is None or flow.op(user) != "quantize":
        return result, graph.next_quant(result) if _readers(builder, result) else None, []
    quant, end = graph.quant(flow.value[user]), flow.only_user(user)
    if quant is None or end is None or flow.op(end) != "dequantize" or graph.quant(flow.value[end]) != quant:
        return result, None, []
    return end, quant, [user]


def _heads(builder: Builder, operand: relax.Expr) -> tuple[relax.Expr, Heads]:
    """Packed float32 that holds an operand ``[B, T, H, C]``, and where in it."""
    batch, length, count, size = shape_of(operand)
    found = view(operand, builder.graph.flow.value.get)
    layout = head_layout(View(found.source, found.index.transpose(0, 2, 1, 3)))
    is_tokens = len(shape_of(found.source)) in (2, 3) and found.source in builder.graph.flow.activations
    if layout is not None and is_tokens:
        packed = builder.packed_float(found.source)
        if packed.geometry == Geometry.of_tokens(batch * length):
            rows, positions, _ = shape_of(packed.expr)
            return packed.expr, Heads(rows, positions, length, layout.first, layout.stride)
    work = Packing(count * size, Geometry.of_tokens(batch * length), True, threads=builder.threads)
    expr = builder.call(work, pack, [builder.flat(operand)], work.packed_shape, "float32")
    return expr, Heads(work.rows, work.geometry.positions, length, 0, size)


def _bias(builder: Builder, bias: relax.Expr, shape: tuple[int, ...]) -> tuple[relax.Expr, Bias]:
    """The bias ``[B, H, Tq, Tk]`` with its keys as channels; a weight is turned now."""
    rows = math.prod(shape[:3])
    work = Packing(shape[3], Geometry.of_tokens(rows), True, threads=builder.threads)
    spec = Bias(work.rows, work.geometry.positions, *shape[:3])
    value = builder.graph.array(bias)
    if value is None:
        return builder.call(work, pack, [builder.flat(bias)], work.packed_shape, "float32"), spec
    turned = np.zeros(work.packed_shape, np.float32)
    turned[: shape[3], :rows, 0] = value.reshape(rows, shape[3]).T
    return builder.constant(f"bias {hashlib.sha256(turned.tobytes()).hexdigest()[:16]}", turned), spec


def _guard(builder: Builder, var: relax.Var, call: relax.Call) -> relax.Var | None:
    """Match ``where(max(bias != -inf, keys) == 0, 0, attention)`` as all that reads the attention."""
    flow = builder.graph.flow
    user = flow.only_user(var)
    if user is None or flow.op(user) != "where" or len(call.args) < 4:
        return None
    condition, zero, kept = flow.value[user].args
    while flow.op(condition) in ("permute_dims", *RESHAPES):
        condition = flow.value[condition].args[0]
    if not kept.same_as(var) or builder.graph.number(zero) != 0 or flow.op(condition) != "equal":
        return None
    most, none = flow.value[condition].args
    if builder.graph.number(none) != 0 or flow.op(most) != "max":
        return None
    value = flow.value[most]
    seen = value.args[0]
    seen = flow.value[seen].args[0] if flow.op(seen) == "astype" else seen
    if flow.op(seen) != "not_equal" or builder.graph.number(flow.value[seen].args[1]) != -math.inf:
        return None
    is_by_row = [int(axis) % 4 for axis in value.attrs.axis or ()] == [3]
    is_same = flow.value[seen].args[0].same_as(call.args[3]) and shape_of(user) == shape_of(var)
    return user if is_by_row and is_same else None


def _readers(builder: Builder, result: relax.Var) -> list[relax.Var]:
    """The reshapes of ``[B, T, H, C]`` to tokens."""
    flow, width = builder.graph.flow, math.prod(shape_of(result)[2:])
    reshapes = [user for user in flow.users[result] if flow.op(user) in RESHAPES]
    return [user for user in reshapes if len(shape_of(user)) in (2, 3) and shape_of(user)[-1] == width]


def _plain(builder: Builder, packed: Packed, var: relax.Var) -> relax.Expr:
    """``[B, T, H, C]``, for readers other than these; dropped at the end if there are none."""
    quant: Quant | None = packed.quant
    scale, zero_point = (None, 0) if quant is None else (quant.scale, quant.zero_point)
    work = Packing(packed.channels, packed.geometry, True, scale, zero_point, builder.threads)
    flat = builder.call(work, unpack, [packed.expr], (work.size,), "float32")
    return builder.emit(relax.op.reshape(flat, shape_of(var)), var.name)
