"""Rules for what runs between layers: each takes a binding and keeps its value packed, or declines."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
from tvm import relax

from pumice.passes.elementwise_table import table_of
from pumice.passes.fusion import RESHAPES, Quant
from pumice.passes.lower_attention import lower_attention
from pumice.passes.lower_elementwise import lower_add, lower_elementwise
from pumice.passes.lower_norm import lower_norm
from pumice.passes.packed import Builder, Packed
from pumice.passes.placement import is_map, plane_of, window_of
from pumice.passes.rewriting import shape_of
from pumice.schedules.elementwise import lookup
from pumice.schedules.functions import FUNCTIONS
from pumice.schedules.gather import Gather, gather
from pumice.schedules.geometry import Geometry
from pumice.schedules.matmul import Matmul, matmul
from pumice.schedules.normalization import Softmax, softmax
from pumice.schedules.places import tap_offsets
from pumice.schedules.pooling import GlobalAverage, Pooling, global_average, pooling

Rule = Callable[[Builder, relax.Var, relax.Call], bool]


def _quantize(builder: Builder, var: relax.Var, call: relax.Call) -> bool:
    """A quantize: nothing if the value already is so, a table, a packed conversion, or packing."""
    quant = builder.graph.quant(call)
    source = call.args[0]
    if quant is None or not isinstance(source, relax.Var) or len(shape_of(source)) < 2 or len(shape_of(source)) > 4:
        return False
    value = builder.packed(source)
    if value is not None and value.quant == quant:
        builder.define(var, value)
        return True
    found = table_of(builder, source, quant)
    if found is not None:
        builder.define(var, _look_up(builder, *found, quant))
    elif value is not None and value.quant is None:
        builder.define(var, builder.quantize(value, quant))
    else:
        builder.define(var, builder.pack(source, quant))
    return True


def _look_up(builder: Builder, value: Packed, table: np.ndarray, quant: Quant) -> Packed:
    words = value.rows * value.geometry.positions
    assert value.quant is not None
    flat = builder.emit(relax.op.reshape(value.expr, (words, 4)), "words")
    constant = builder.constant(f"table {hashlib.sha256(table.tobytes()).hexdigest()[:16]}", table)
    looked_up = builder.call(words, lookup, [flat, constant], (words, 4), "uint8")
    shape = (value.rows, value.geometry.positions, 4)
    expr = builder.emit(relax.op.reshape(looked_up, shape), "looked_up")
    result = Packed(expr, value.channels, value.geometry, quant)
    if value.geometry.is_padded and table[value.quant.zero_point] != quant.zero_point:
        return builder.repad(result)
    return result


def _dequantize(builder: Builder, var: relax.Var, call: relax.Call) -> bool:
    value = builder.packed(call.args[0])
    quant = builder.graph.quant(call)
    if value is not None and value.quant is not None and quant is not None:
        result = Packed(value.expr, value.channels, value.geometry, quant)
        same_zero = quant.zero_point == value.quant.zero_point or not value.geometry.is_padded
        builder.define(var, result if same_zero else builder.repad(result))
        return True
    if call.args[0] in builder.graph.flow.weights:
        builder.set_lazy(var, call)
        return True
    return False


def _max_pool(builder: Builder, var: relax.Var, call: relax.Call) -> bool:
    value = builder.packed(call.args[0])
    if value is None or not is_map(var) or not _is_plain_pool(call):
        return False
    fill = 0.0 if value.quant is not None else float(np.finfo(np.float32).min)
    return _pool(builder, var, call, value, "maximum", value.quant, fill)


def _avg_pool(builder: Builder, var: relax.Var, call: relax.Call) -> bool:
    value = builder.packed(call.args[0])
    if value is None or not is_map(var) or not _is_plain_pool(call) or call.attrs.ceil_mode:
        return False
    if any(int(p) for p in call.attrs.padding) and not call.attrs.count_include_pad:
        return False
    quant = None if value.quant is None else builder.graph.next_quant(var)
    if value.quant is not None and quant is None:
        return False
    fill = 0.0 if value.quant is None else float(value.quant.zero_point)
    return _pool(builder, var, call, value, "average", quant, fill)


def _pool(
    builder: Builder, var: relax.Var, call: relax.Call, value: Packed, kind: str, quant: Quant | None, fill: float
) -> bool:
    kernel = [int(extent) for extent in call.attrs.pool_size]
    window = window_of(call, (kernel[0], kernel[-1]))
    target = builder.target_geometry(call.args[0], var, window)
    if target.positions == 1:  # a window of one pixel; the kernel writes whole vectors
        return False
    rows = value.rows
    moved = builder.move(value, target, window, fill, always=kind == "maximum")
    taps = tuple(int(offset) for offset in tap_offsets(window, moved.geometry, target))
    multiplier, zero_point, out_zero = _mean_of(len(taps), value.quant, quant)
    work = Pooling(
        kind=kind,
        dtype=value.dtype,
        rows=rows,
        phases=len(window.phases()),
        source=moved.geometry,
        target=target,
        offsets=taps,
        zero_point=zero_point,
        multiplier=multiplier,
        output_zero_point=out_zero,
        threads=builder.threads,
    )
    arguments = [moved.expr, *builder.mask(target)]
    expr = builder.call(work, pooling, arguments, (rows, target.positions, value.depth), value.dtype)
    builder.define(var, Packed(expr, value.channels, target.normalized(), quant))
    return True


def _mean_of(count: int, source: Quant | None, target: Quant | None) -> tuple[float, int, int]:
    """What turns a sum of ``count`` values into their mean: multiplier (a float32), input and output zero point."""
    if source is None or target is None:
        return float(np.float32(1.0 / count)), 0, 0
    multiplier = 1.0 / count * (source.scale / target.scale)
    return float(np.float32(multiplier)), source.zero_point, target.zero_point


def _is_plain_pool(call: relax.Call) -> bool:
    return str(call.attrs.layout) == "NCHW"


def _global_average(builder: Builder, var: relax.Var, call: relax.Call) -> bool:
    source = call.args[0]
    value = builder.packed(source)
    if value is None or not is_map(source):
        return False
    if builder.graph.flow.op(var) == "mean":
        if sorted(int(axis) % 4 for axis in call.attrs.axis or []) != [2, 3]:
            return False
    elif shape_of(var)[2:] != (1, 1):
        return False
    quant = None if value.quant is None else builder.graph.next_quant(var)
    if value.quant is not None and quant is None:
        return False
    batch, pixels = value.geometry.batch, value.geometry.height * value.geometry.width
    if shape_of(source)[2:] == (1, 1):
        return False
    target = Geometry(batch, 1, 1)
    multiplier, zero_point, out_zero = _mean_of(pixels, value.quant, quant)
    work = GlobalAverage(value.dtype, value.rows, value.geometry, target, zero_point, multiplier, out_zero)
    shape = (value.rows, target.positions, value.depth)
    expr = builder.call(work, global_average, [value.expr], shape, value.dtype)
    builder.define(var, Packed(expr, value.channels, target.normalized(), quant))
    return True


def _relabel(builder: Builder, var: relax.Var, call: relax.Call) -> bool:
    """A reshape that moves nothing: between ``[N, C, 1, 1]`` and ``[N, C]``, or among token shapes."""
    source = call.args[0]
    value = builder.packed(source)
    if value is None or len(shape_of(var)) not in (2, 3, 4):
        return False
    same_plane = plane_of(var) == plane_of(source)
    if not same_plane or plane_of(var)[0][:2] != (1, 1) or value.geometry.is_padded:
        return False
    if is_map(source) and is_map(var) and shape_of(source) != shape_of(var):
        return False
    if is_map(source) != is_map(var) and shape_of(source if is_map(source) else var)[2:] != (1, 1):
        return False
    builder.define(var, value)
    return True


def _concat(builder: Builder, var: relax.Var, call: relax.Call) -> bool:
    """Along channels, where all parts but the last are whole words: rows one after the other."""
    if not isinstance(call.args[0], relax.Tuple) or int(call.attrs.axis) % len(shape_of(var)) != _channel_axis(var):
        return False
    parts = [builder.packed(part) for part in call.args[0].fields]
    first = parts[0]
    if first is None or len(shape_of(var)) < 2:
        return False
    for part in parts:
        if part is None or part.quant != first.quant or part.geometry != first.geometry:
            return False
    known = [part for part in parts if part is not None]
    if any(part.channels % 4 for part in known[:-1]):
        return False
    expr = builder.emit(relax.op.concat([part.expr for part in known], axis=0), "concat")
    channels = sum(part.channels for part in known)
    builder.define(var, Packed(expr, channels, first.geometry, first.quant))
    return True


def _channel_axis(var: relax.Var) -> int:
    return 1 if is_map(var) else len(shape_of(var)) - 1


def _matmul(builder: Builder, var: relax.Var, call: relax.Call) -> bool:
    """A product of two activations, on plain tensors."""
    left, right = (shape_of(argument) for argument in call.args)
    if str(var.ty.dtype) != "float32" or len(left) < 2 or len(right) < 2 or any(0 in s for s in (left, right)):
        return False
    batch, shared = math.prod(left[:-2]), math.prod(right[:-2]) == 1
    if (not shared and left[:-2] != right[:-2]) or shape_of(var)[:-2] != left[:-2]:
        return False
    if shared:  # one matrix for all: the batch is just more rows
        work = Matmul(1, batch * left[-2], right[-1], left[-1], True, builder.threads)
    else:
        work = Matmul(batch, left[-2], right[-1], left[-1], False, builder.threads)
    builder.call_on_rows(var, list(call.args), work, matmul)
    return True


def _softmax(builder: Builder, var: relax.Var, call: relax.Call) -> bool:
    shape = shape_of(var)
    if str(var.ty.dtype) != "float32" or int(call.attrs.axis) % len(shape) != len(shape) - 1 or 0 in shape:
        return False
    work = Softmax(math.prod(shape[:-1]), shape[-1], builder.threads)
    builder.call_on_rows(var, call.args[:1], work, softmax)
    return True


def _take(builder: Builder, var: relax.Var, call: relax.Call) -> bool:
    """Rows of a table of weights or activations: an embedding."""
    table, index = call.args
    entries, *row = shape_of(table)
    rows, length = math.prod(shape_of(index)), math.prod(row)
    dtypes = str(table.ty.dtype), str(index.ty.dtype)
    if call.attrs.axis is None or int(call.attrs.axis) != 0 or str(call.attrs.mode) not in ("fast", "clip"):
        return False
    is_small = 0 < entries * length < 2**31 and 0 < rows * length < 2**31
    if not is_small or dtypes[0] != "float32" or dtypes[1] not in ("int32", "int64"):
        return False
    work = Gather(entries, length, rows, dtypes[1], builder.threads)
    builder.call_on_rows(var, [table, index], work, gather)
    return True


OPERATORS: dict[str, Rule] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "nn.max_pool2d": _max_pool,
    "nn.avg_pool2d": _avg_pool,
    "nn.adaptive_avg_pool2d": _global_average,
    "mean": _global_average,
    "add": lower_add,
    "concat": _concat,
    "matmul": _matmul,
    "nn.softmax": _softmax,
    "take": _take,
    "nn.attention": lower_attention,
    "nn.attention_bias": lower_attention,
    "nn.layer_norm": lower_norm,
    "nn.rms_norm": lower_norm,
    **dict.fromkeys(RESHAPES, _relabel),
    **dict.fromkeys(set(FUNCTIONS) - {"add"}, lower_elementwise),
}
