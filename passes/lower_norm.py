"""Lowering layer norm and RMS norm: on packed float32 where their readers want it packed, on plain rows elsewhere."""

from __future__ import annotations

import hashlib
import math

import numpy as np
from tvm import relax

from pumice.passes.fusion import Quant
from pumice.passes.packed import Builder, Packed
from pumice.passes.placement import is_map, plane_of
from pumice.passes.rewriting import shape_of
from pumice.schedules.cuda.packed_norm import cuda_packed_norm
from pumice.schedules.normalization import LayerNorm, layer_norm
from pumice.schedules.packed_norm import PackedNorm, packed_norm


def lower_norm(builder: Builder, var: relax.Var, call: relax.Call) -> bool:
    """``nn.layer_norm`` or ``nn.rms_norm`` over the last axis."""
    shape, attrs = shape_of(var), call.attrs
    is_last = [int(axis) % len(shape) for axis in attrs.axes] == [len(shape) - 1]
    if str(var.ty.dtype) != "float32" or not is_last or 0 in shape:
        return False
    centres = builder.graph.flow.op(var) == "nn.layer_norm"
    if centres and not (attrs.center and attrs.scale):
        return False
    return _norm_packed(builder, var, call) or (centres and _norm_plain(builder, var, call))


def _norm_packed(builder: Builder, var: relax.Var, call: relax.Call) -> bool:
    """One kernel that writes what is read of its result: packed float32, bytes, or both."""
    data, *parameters = call.args
    vectors = [builder.graph.array(parameter) for parameter in parameters]
    channels, known = shape_of(var)[-1], builder.packed(data)
    if is_map(var) or len(shape_of(var)) < 2 or any(v is None or v.shape != (channels,) for v in vectors):
        return False
    if plane_of(var)[0] == (1, 1, 1):  # one position: no lanes to fill
        return False
    quantized = _quantize_of(builder, var)
    is_packed = known is not None and known.quant is None
    if not is_packed and quantized is None and not _feeds_layer(builder, var):
        return False
    source = builder.packed_float(data)
    others = [reader for reader in builder.graph.flow.users[var] if reader is not quantized]
    reads_float = bool(others) or var in builder.graph.flow.outputs or quantized is None
    quant = None if quantized is None else builder.graph.quant(builder.graph.flow.value[quantized])
    work = PackedNorm(
        channels=channels,
        positions=source.geometry.positions,
        span=source.geometry.span,
        epsilon=float(call.attrs.epsilon),
        centres=len(vectors) == 2,
        writes_float=reads_float,
        multiplier=None if quant is None else float(np.float32(1.0 / quant.scale)),
        zero_point=0 if quant is None else quant.zero_point,
        threads=builder.threads,
    )
    rows = [_row_vector(builder, p, v, work.rows) for p, v in zip(parameters, vectors, strict=True) if v is not None]
    written: list[tuple[relax.Var, Quant | None]] = [(var, None)] if reads_float else []
    if quantized is not None:
        written.append((quantized, quant))
    floats = relax.TensorType([work.rows, work.positions, 1], "float32")
    bytes_ = relax.TensorType([work.rows // 4, work.positions, 4], "uint8")
    types = [floats if stored is None else bytes_ for _, stored in written]
    make = cuda_packed_norm if builder.target.runs_on_gpu else packed_norm
    results = builder.call_for(work, make, [source.expr, *rows], types, "packed_norm")
    for (made, stored), expr in zip(written, results, strict=True):
        builder.define(made, Packed(expr, channels, source.geometry, stored))
    return True


def _quantize_of(builder: Builder, var: relax.Var) -> relax.Var | None:
    """A per-tensor quantize that reads ``var``."""
    flow = builder.graph.flow
    for reader in flow.users[var]:
        if flow.op(reader) == "quantize" and builder.graph.quant(flow.value[reader]) is not None:
            return reader
    return None


def _feeds_layer(builder: Builder, var: relax.Var) -> bool:
    """Whether a float layer reads it, which will want it packed."""
    return any(layer.data.same_as(var) for layer in builder.graph.layers)


def _row_vector(builder: Builder, parameter: relax.Expr, value: np.ndarray, rows: int) -> relax.Expr:
    """A number for each row; rows beyond the channels have none of their own."""
    if len(value) == rows:
        return parameter
    padded = np.pad(value, (0, rows - len(value)))
    return builder.constant(f"rows {hashlib.sha256(padded.tobytes()).hexdigest()[:16]}", padded)


def _norm_plain(builder: Builder, var: relax.Var, call: relax.Call) -> bool:
    shape = shape_of(var)
    work = LayerNorm(math.prod(shape[:-1]), shape[-1], float(call.attrs.epsilon), builder.threads)
    builder.call_on_rows(var, list(call.args), work, layer_norm)
    return True
