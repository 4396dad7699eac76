"""Converters in place of TVM's where those give other numbers than torch, read out of bounds, or are missing.

Each takes the importer (its ``env`` holds what was converted so far, its ``block_builder`` emits) and a node of the
decomposed program, and returns the Relax expression. A ValueError says why a form is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx
from tvm import relax
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter as Importer


def _arguments(node: fx.Node, *names: str, **defaults: Any) -> list[Any]:
    """The arguments called ``names`` of a node, wherever they stand; ``defaults`` for those left out."""
    schema = node.target._schema
    given = {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    given.update(node.kwargs)
    for argument in schema.arguments:
        if argument.name not in given and argument.has_default_value():
            given[argument.name] = argument.default_value
    return [given[name] if given[name] is not None else defaults.get(name) for name in names]


def _select(importer: Importer, node: fx.Node) -> relax.Expr:
    """TVM's reads before the tensor where the index is negative."""
    x, axis, index = _arguments(node, "self", "dim", "index")
    extent = node.args[0].meta["val"].shape[axis]
    position = relax.const(index % extent, "int64")
    return importer.block_builder.emit(relax.op.take(importer.env[x], position, axis, mode="clip"))


def _embedding(importer: Importer, node: fx.Node) -> relax.Expr:
    """TVM's reads out of bounds for an index that the table does not have; here it is clipped."""
    table, indices = _arguments(node, "weight", "indices")
    return importer.block_builder.emit(relax.op.take(importer.env[table], importer.env[indices], 0, mode="clip"))


def _index_select(importer: Importer, node: fx.Node) -> relax.Expr:
    x, axis, indices = _arguments(node, "self", "dim", "index")
    return importer.block_builder.emit(relax.op.take(importer.env[x], importer.env[indices], axis, mode="clip"))


def _index(importer: Importer, node: fx.Node) -> relax.Expr:
    """One index tensor of integers: ``x[:, i]``. TVM's reads out of bounds where an index is negative."""
    x, indices = _arguments(node, "self", "indices")
    used = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if any(index.meta["val"].dtype == torch.bool for _, index in used):
        raise ValueError("the shape of what a boolean index selects depends on data")
    if len(used) == 1:
        axis, index = used[0]
        return importer.block_builder.emit(relax.op.take(importer.env[x], importer.env[index], axis, mode="wrap"))
    axes = [axis for axis, _ in used]
    first = axes[0]
    if axes != list(range(first, first + len(axes))):
        raise ValueError("several index tensors must stand for neighbouring axes")
    shape = x.meta["val"].shape
    positive = [
        importer.block_builder.emit(
            relax.op.floor_mod(importer.env[index], relax.const(shape[axis], importer.env[index].ty.dtype.dtype))
        )
        for axis, index in used
    ]
    # The indexed axes to the front, where Relax wants them, and what they became back to where they were.
    others = [axis for axis in range(len(shape)) if axis not in axes]
    front = importer.block_builder.emit(relax.op.permute_dims(importer.env[x], [*axes, *others]))
    taken = importer.block_builder.emit(relax.op.index_tensor(front, positive))
    rank = len(taken.ty.shape)
    new = rank - len(others)
    back = [*range(new, new + first), *range(new), *range(new + first, rank)]
    return importer.block_builder.emit(relax.op.permute_dims(taken, back))


def _elu(importer: Importer, node: fx.Node) -> relax.Expr:
    """``scale * (max(x, 0) - alpha * max(1 - exp(input_scale * x), 0))``; TVM's leaves both scales out (so SELU)."""
    x, alpha, scale, input_scale = _arguments(node, "self", "alpha", "scale", "input_scale")
    x = importer.env[x]
    exponent = relax.op.exp(x if input_scale == 1 else relax.op.multiply(x, _float(input_scale)))
    below = relax.op.nn.relu(relax.op.subtract(_float(1), exponent))
    above = relax.op.nn.relu(x)
    if scale != 1:
        above = relax.op.multiply(above, _float(scale))
    return importer.block_builder.emit(relax.op.subtract(above, relax.op.multiply(below, _float(alpha * scale))))


def _clamp(importer: Importer, node: fx.Node) -> relax.Expr:
    """TVM's takes an absent bound for infinity, which integers do not have."""
    x, low, high = _arguments(node, "self", "min", "max")
    x = importer.env[x]
    dtype = str(x.ty.dtype.dtype)
    if dtype.startswith("float") and not any(isinstance(bound, fx.Node) for bound in (low, high)):
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        return importer.block_builder.emit(relax.op.clip(x, low, high))
    for bound, choose in ((low, relax.op.maximum), (high, relax.op.minimum)):
        if isinstance(bound, fx.Node):
            x = importer.block_builder.emit(choose(x, importer.env[bound]))
        elif bound is not None and isinstance(bound, float) and not dtype.startswith("float"):
            raise ValueError("integers clamped to a float bound")
        elif bound is not None:
            x = importer.block_builder.emit(choose(x, relax.const(bound, dtype)))
    return x


def _group_norm(importer: Importer, node: fx.Node) -> relax.Expr:
    """TVM's fails where the layer has no weight and bias."""
    x, weight, bias, channels, groups, epsilon = _arguments(node, "input", "weight", "bias", "C", "group", "eps")
    scale = importer.env[weight] if weight is not None else relax.const(np.ones(channels, "float32"))
    shift = importer.env[bias] if bias is not None else relax.const(np.zeros(channels, "float32"))
    x = importer.env[x]
    axes = list(range(2, len(x.ty.shape)))
    return importer.block_builder.emit(
        relax.op.nn.group_norm(x, scale, shift, groups, channel_axis=1, axes=axes, epsilon=epsilon)
    )


def _attention(importer: Importer, node: fx.Node) -> relax.Expr:
    """``softmax(q k^T * scale + mask) v`` on the last two axes, in operators that every pass knows.

    A row that its mask hides entirely gives 0, as in torch. TVM's takes four axes only and ignores ``scale``.
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    query, key, value, mask, dropout, causal, scale = _arguments(node, *names)
    if dropout:
        raise ValueError("dropout in attention makes the result random")
    emit = importer.block_builder.emit
    q, k, v = (importer.env[operand] for operand in (query, key, value))
    rank, depth = len(q.ty.shape), int(q.ty.shape[-1])
    if {len(k.ty.shape), len(v.ty.shape)} != {rank}:
        raise ValueError("query, key and value have different ranks")
    factor = scale if scale is not None else 1 / math.sqrt(depth)
    transposed = emit(relax.op.permute_dims(k, [*range(rank - 2), rank - 1, rank - 2]))
    scores = emit(relax.op.multiply(emit(relax.op.matmul(q, transposed)), _float(factor)))
    hidden = None
    if causal:
        length, keys = int(q.ty.shape[-2]), int(k.ty.shape[-2])
        seen = np.tril(np.ones((length, keys), "bool"))
        scores = emit(relax.op.add(scores, relax.const(np.where(seen, 0, -np.inf).astype("float32"))))
    if mask is not None:
        bias = importer.env[mask]
        if str(bias.ty.dtype.dtype) == "bool":
            scores = emit(relax.op.where(bias, scores, _float(-math.inf)))
        else:
            scores = emit(relax.op.add(scores, bias))
        # Not the highest score against -inf: TVM's maximum starts from the lowest finite number.
        visible = emit(relax.op.astype(relax.op.not_equal(scores, _float(-math.inf)), "int8"))
        hidden = emit(relax.op.equal(relax.op.max(visible, axis=-1, keepdims=True), relax.const(0, "int8")))
    shares = emit(relax.op.nn.softmax(scores, axis=-1))
    if hidden is not None:
        shares = emit(relax.op.where(hidden, _float(0), shares))
    return emit(relax.op.matmul(shares, v))


def _upsample_nearest(importer: Importer, node: fx.Node) -> relax.Expr:
    """Rows and columns picked where torch picks them; TVM's picks by the nearest centre."""
    x, size, factors = _arguments(node, "input", "output_size", "scale_factors")
    _, _, height, width = node.args[0].meta["val"].shape
    columns, rows = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    picked_rows, picked_columns = (
        torch.ops.aten.upsample_nearest2d.vec(grid[None, None].float(), size, factors)[0, 0] for grid in (rows, columns)
    )
    result = importer.env[x]
    for axis, picked in ((2, picked_rows[:, 0]), (3, picked_columns[0])):
        result = importer.block_builder.emit(
            relax.op.take(result, relax.const(picked.long().numpy()), axis, mode="clip")
        )
    return result


def _upsample_bilinear(importer: Importer, node: fx.Node) -> relax.Expr:
    """TVM's knows only the sizes: a factor that does not divide them means another sampling grid."""
    x, size, align, factors = _arguments(node, "input", "output_size", "align_corners", "scale_factors")
    before, after = node.args[0].meta["val"].shape[2:], node.meta["val"].shape[2:]
    if size is None and not align and any(n * f != m for n, m, f in zip(before, after, factors, strict=True)):
        raise ValueError("scale_factor gives a fractional size; pass size= or recompute_scale_factor=True")
    transformation = "align_corners" if align else "half_pixel"
    return importer.block_builder.emit(
        relax.op.image.resize2d(
            importer.env[x],
            [int(extent) for extent in after],
            layout="NCHW",
            method="linear",
            coordinate_transformation_mode=transformation,
        )
    )


def _divide(importer: Importer, node: fx.Node) -> relax.Expr:
    """``floor(x / y)`` or ``trunc(x / y)``; TVM's gives a number that is divided by the wrong data type."""
    x, y, mode = _arguments(node, "self", "other", "rounding_mode")
    x = importer.env[x]
    y = importer.env[y] if isinstance(y, fx.Node) else relax.const(y, x.ty.dtype.dtype)
    if mode == "floor":
        return importer.block_builder.emit(relax.op.floor_divide(x, y))
    if mode == "trunc" and str(x.ty.dtype.dtype).startswith("float"):
        return importer.block_builder.emit(relax.op.trunc(relax.op.divide(x, y)))
    raise ValueError(f"rounding_mode={mode} of integers")


def _avg_pool(importer: Importer, node: fx.Node) -> relax.Expr:
    (divisor,) = _arguments(node, "divisor_override")
    if divisor is not None:
        raise ValueError("divisor_override")
    return importer.convert_map[node.target.__name__](node)


def _dropout(importer: Importer, node: fx.Node) -> Any:
    x, _, training = _arguments(node, "input", "p", "train")
    if training is not False:
        raise ValueError("dropout in training mode makes the result random")
    return relax.Tuple([importer.env[x], importer.env[x]])


def _getitem(importer: Importer, node: fx.Node) -> relax.Expr:
    """Normalisations arrive as their first result alone; TVM's gives that whichever result is asked for."""
    pair, index = importer.env[node.args[0]], node.args[1]
    if isinstance(pair, relax.Expr) and isinstance(pair.ty, relax.TensorType):
        if index != 0:
            raise ValueError(f"result {index} of it is used")
        return pair
    return pair[index] if isinstance(pair, (list, tuple, relax.Tuple)) else importer.block_builder.emit(pair[index])


def _reduction(reduce: Callable[..., relax.Expr]) -> Callable[[Importer, fx.Node], relax.Expr]:
    def convert(importer: Importer, node: fx.Node) -> relax.Expr:
        x, axes, keep = _arguments(node, "self", "dim", "keepdim")
        return importer.block_builder.emit(reduce(importer.env[x], axes or None, keepdims=keep))

    return convert


def _prod(importer: Importer, node: fx.Node) -> relax.Expr:
    x, axis, keep = _arguments(node, "self", "dim", "keepdim")
    return importer.block_builder.emit(relax.op.prod(importer.env[x], [axis], keepdims=keep))


def _any(importer: Importer, node: fx.Node) -> relax.Expr:
    x, axes, keep = _arguments(node, "self", "dim", "keepdim") if len(node.args) > 1 else (node.args[0], None, False)
    x = importer.env[x]
    dtype = str(x.ty.dtype.dtype)
    true = x if dtype == "bool" else relax.op.not_equal(x, relax.const(0, dtype))
    counted = relax.op.max(relax.op.astype(true, "int8"), axes, keepdims=keep)
    return importer.block_builder.emit(relax.op.astype(counted, "bool"))


def _float(value: float) -> relax.Expr:
    return relax.const(value, "float32")


REPLACED: dict[str, Callable[[Importer, fx.Node], Any]] = {
    "amax.default": _reduction(relax.op.max),
    "amin.default": _reduction(relax.op.min),
    "any.default": _any,
    "any.dim": _any,
    "any.dims": _any,
    "avg_pool2d.default": _avg_pool,
    "avg_pool3d.default": _avg_pool,
    "clamp.Tensor": _clamp,
    "clamp.default": _clamp,
    "div.Tensor_mode": _divide,
    "elu.default": _elu,
    "embedding.default": _embedding,
    "getitem": _getitem,
    "index.Tensor": _index,
    "index_select.default": _index_select,
    "native_dropout.default": _dropout,
    "native_group_norm.default": _group_norm,
    "prod.dim_int": _prod,
    "scaled_dot_product_attention.default": _attention,
    "select.int": _select,
    "upsample_bilinear2d.vec": _upsample_bilinear,
    "upsample_nearest2d.vec": _upsample_nearest,
}
