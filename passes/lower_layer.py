"""Lowering one layer, with what is fused to it, to a kernel call: weights as blocks, offsets, folded numbers."""

from __future__ import annotations

import numpy as np
from tvm import relax

from pumice.passes.choose_kernel import Choice
from pumice.passes.fusion import Fused, Quant
from pumice.passes.layer_kernel import LayerKernel, LayerWork, Numbers, layer_kernel
from pumice.passes.layers import Layer
from pumice.passes.packed import Builder, Packed
from pumice.passes.placement import is_map, plane_of, window_of
from pumice.passes.rewriting import shape_of
from pumice.passes.tensor_cores import kernel_on_gpu
from pumice.record import LayerRecord
from pumice.schedules.blocks import Blocks, expand_groups
from pumice.schedules.epilogue import Epilogue, Residual
from pumice.schedules.geometry import Geometry, Window
from pumice.schedules.places import Places


def lower_layer(builder: Builder, chain: Fused) -> bool:
    """Emit the kernel of ``chain``; False, with the reason in the record, where there is none."""
    layer = chain.layer
    record = builder.records.setdefault(layer.name, _new_record(layer))
    if layer.operator == "linear" and is_map(layer.data):
        record.kernel, record.dtype = "tvm", "float32"
        record.reason = (
            "its input has four axes, which the packed form takes for a feature map: runs as a float operator"
        )
        return False
    numbers = _numbers(builder, chain, record)
    if numbers is None:
        return False
    source = _packed_as(builder, layer.data, chain.input_quant)
    if source.quant != chain.input_quant:
        record.kernel = "tvm"
        record.reason = "its input is quantized in a way that has no packed form; runs as a float operator"
        return False
    window, target = _placing(builder, layer, source)
    source = builder.move(source, target, window)
    residual = _residual(builder, chain, target)
    epilogue = _epilogue(chain, residual, numbers.multiplier)
    places = Places(window, source.geometry, target)
    work = LayerWork(layer.name, numbers, places, source.rows, epilogue, builder.threads)
    kernel, choice = _kernel(builder, work, builder.chooser.choose(work, builder.isa))
    expr = _emit(builder, work, kernel, source, residual)
    channels = plane_of(layer.var)[1]
    builder.define(chain.result, Packed(expr, channels, target.normalized(), chain.quant))
    _note(record, layer, choice, numbers)
    return True


def _placing(builder: Builder, layer: Layer, source: Packed) -> tuple[Window, Geometry]:
    """The layer's taps, and where its output lies."""
    if layer.operator == "linear":
        return Window((1, 1)), source.geometry
    kernel = shape_of(layer.weight)[2:]
    window = window_of(layer.call, (int(kernel[0]), int(kernel[1])))
    return window, builder.target_geometry(layer.data, layer.var, window)


def _kernel(builder: Builder, work: LayerWork, choice: Choice) -> tuple[LayerKernel, Choice]:
    """The layer's kernel, and the choice that led to it in the end."""
    if builder.target.runs_on_gpu and isinstance(choice.weight, Blocks):
        return kernel_on_gpu(work, choice, choice.weight, builder.target)
    return layer_kernel(work, choice.weight, choice.tiling), choice


def _emit(builder: Builder, work: LayerWork, kernel: LayerKernel, source: Packed, residual: Packed | None) -> relax.Var:
    """The call of the layer's kernel."""
    arguments = [source.expr]
    arguments += [builder.constant(f"{work.name}.{name}", array) for name, array in kernel.constants.items()]
    arguments += [residual.expr] if residual is not None else []
    arguments += builder.mask(work.places.target)
    name, shape = f"layer_{work.name}", work.output_shape
    return builder.call(kernel.work, kernel.make, arguments, shape, work.epilogue.output, name)


def _residual(builder: Builder, chain: Fused, target: Geometry) -> Packed | None:
    if chain.residual is None:
        return None
    return builder.move(_packed_as(builder, chain.residual, chain.residual_quant), target, Window((1, 1)))


def _packed_as(builder: Builder, var: relax.Var, quant: Quant | None) -> Packed:
    """The packed form of ``var``: float32, or the bytes that it was dequantized from, made again if they were lost."""
    if quant is None:
        return builder.packed_float(var)
    value = builder.packed(var)
    return value if value is not None and value.quant is not None else builder.pack(var, quant)


def _epilogue(chain: Fused, residual: Packed | None, multiplier: np.ndarray | None) -> Epilogue:
    out = chain.quant
    if out is None:
        spec = Residual() if residual else None
        return Epilogue("float32", spec, 0, chain.low, chain.high, chain.activation, parameters=chain.parameters)
    spec, scale = None, 1.0
    if chain.activation is not None:
        scale = float(np.float32(1.0 / out.scale))
    if residual is not None and residual.quant is not None:
        unit = out.scale if chain.activation is None else 1.0
        spec = Residual(float(np.float32(residual.quant.scale / unit)), residual.quant.zero_point)
    largest = 2.0**31 * (0.0 if multiplier is None else float(multiplier.max(initial=0)))
    fits = (largest + (255 * spec.multiplier if spec else 0.0)) * scale < 2**30
    low, high = out.store(chain.low), out.store(chain.high)
    return Epilogue("uint8", spec, out.zero_point, low, high, chain.activation, scale, fits, chain.parameters)


def _numbers(builder: Builder, chain: Fused, record: LayerRecord) -> Numbers | None:
    """Weight, bias and multiplier; None, with the reason in ``record``, where int8 would not be exact."""
    layer = chain.layer
    weight = builder.graph.array(layer.weight)
    if weight is None:
        record.kernel, record.reason = "tvm", "its weight is computed at run time"
        return None
    groups = int(layer.call.attrs.groups) if layer.operator == "conv2d" else 1
    channels = plane_of(layer.var)[1]
    bias = np.zeros(channels, np.float32) if chain.bias is None else chain.bias
    if layer.weight_scale is None:
        if weight.dtype != np.float32:
            record.kernel, record.reason = "tvm", f"its weight is {weight.dtype}"
            return None
        return Numbers(expand_groups(layer.to_rows(weight), groups), bias.astype(np.float32), None)
    scale = builder.graph.array(layer.weight_scale)
    zero_point = builder.graph.weight_zero_point(layer)
    if scale is None or zero_point is None or weight.dtype != np.int8 or zero_point.any():
        record.kernel = "tvm"
        record.reason = "its weight is not int8 with zero point 0: runs as a float operator"
        return None
    rows = layer.to_rows(weight)
    per_channel = np.broadcast_to(scale.astype(np.float64).ravel(), (channels,))
    if chain.input_quant is None:
        record.dtype = "float32"
        record.reason = record.reason or "its input is not quantized"
        floats = (rows * per_channel[:, None, None]).astype(np.float32)
        return Numbers(expand_groups(floats, groups), bias.astype(np.float32), None)
    return _int8_numbers(chain, rows, per_channel, bias, groups, builder.isa.sign, record)


def _int8_numbers(
    chain: Fused, rows: np.ndarray, scale: np.ndarray, bias: np.ndarray, groups: int, sign: int, record: LayerRecord
) -> Numbers | None:
    """``acc + bias_q`` where ``bias_q = round(bias / (sx * sw)) - zx * sum(w)``: the input's zero point folded in.

    Where ``sign`` is what packed bytes are turned by, they are less by it, and so is their zero point.
    """
    assert chain.input_quant is not None
    quant = chain.input_quant
    product = quant.scale * scale
    wide = rows.astype(np.int64)
    folded = np.rint(bias.astype(np.float64) / product) - quant.zero_point * wide.sum(axis=(1, 2))
    worst = np.abs(folded) + 255 * np.maximum(wide.clip(min=0).sum(axis=(1, 2)), -wide.clip(max=0).sum(axis=(1, 2)))
    if not np.isfinite(folded).all() or (worst >= 2**31).any():
        record.kernel = "tvm"
        record.reason = "its int32 accumulator could overflow: runs as a float operator"
        return None
    output = 1.0 if chain.quant is None or chain.activation is not None else chain.quant.scale
    multiplier = (product / output).astype(np.float32)
    record.dtype = "int8"
    packed_bias = folded + sign * wide.sum(axis=(1, 2))
    return Numbers(expand_groups(rows, groups), packed_bias.astype(np.int32), multiplier)


def _new_record(layer: Layer) -> LayerRecord:
    shape = shape_of(layer.weight)
    return LayerRecord(layer.name, layer.operator, layer.weight.name, shape, layer.macs)


def _note(record: LayerRecord, layer: Layer, choice: Choice, numbers: Numbers) -> None:
    groups = int(layer.call.attrs.groups) if layer.operator == "conv2d" else 1
    how = f"its {groups} groups run as block sparsity: {choice.reason}" if groups > 1 else choice.reason
    record.kernel = choice.kernel
    record.compiled_bytes = choice.nbytes + numbers.bias.nbytes
    record.compiled_bytes += 0 if numbers.multiplier is None else numbers.multiplier.nbytes
    record.reason = f"{record.reason}; {how}" if record.reason else how
