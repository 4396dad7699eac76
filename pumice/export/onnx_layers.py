"""What each Relax operator of a network's layers is in ONNX: convolutions, pools, norms, attention, quantization."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from tvm import relax

from pumice.export.onnx_graph import OnnxGraph, Value
from pumice.passes.rewriting import dtype_of, shape_of

Rule = Callable[[OnnxGraph, relax.Var, relax.Call], Value]

_INT32_LIMIT = 2**31 - 1


def _conv(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    """A convolution takes its bias along: only so does ONNX Runtime compute both on integers."""
    attrs = call.attrs
    if not attrs.data_layout.startswith("NC") or not attrs.kernel_layout.startswith("OI"):
        raise graph.refusal(f"has the layouts {attrs.data_layout} and {attrs.kernel_layout}")
    inputs = [graph.read(operand) for operand in call.args]
    biased = graph.flow.biased(var) if len(shape_of(var)) == 4 else var
    if biased is not var:
        bias = graph.flow.bias(biased, var)
        assert bias is not None
        inputs.append(_conv_bias(graph, call, bias))
    result = graph.node(
        "Conv",
        inputs,
        strides=[int(stride) for stride in attrs.strides],
        pads=[int(width) for width in attrs.padding],
        dilations=[int(step) for step in attrs.dilation],
        group=int(attrs.groups),
    )
    graph.values[biased] = result
    return result


def _conv_bias(graph: OnnxGraph, conv: relax.Call, bias: relax.Expr) -> str:
    """The bias as ``[N]``; of an int8 layer as int32 in units of the accumulator, where it fits.

    That is how the compiled layer has it too, rounded to the same integers.
    """
    value = graph.array(bias)
    assert value is not None
    value = value.reshape(-1)
    name = str(bias.name) if isinstance(bias, relax.Var) else ""
    scales = [_scale_of_dequantized(graph, operand) for operand in conv.args]
    if scales[0] is None or scales[1] is None or scales[0].size != 1:
        return graph.constant(value, name)
    scale = np.broadcast_to(scales[0].reshape(()) * scales[1].reshape(-1), value.shape).astype(np.float32)
    if scale.min() < np.finfo(np.float32).tiny:
        return graph.constant(value, name)
    steps = np.rint(value / scale.astype(np.float64))
    if np.abs(steps).max() > _INT32_LIMIT:
        return graph.constant(value, name)
    inputs = [graph.constant(steps.astype(np.int32), name), graph.constant(scale, f"{name}.scale" if name else "")]
    return graph.node("DequantizeLinear", inputs, axis=0)


def _scale_of_dequantized(graph: OnnxGraph, operand: relax.Expr) -> np.ndarray | None:
    return graph.array(graph.flow.value[operand].args[1]) if graph.flow.op(operand) == "dequantize" else None


def _conv_transpose(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    attrs = call.attrs
    if not attrs.data_layout.startswith("NC") or not attrs.kernel_layout.startswith("IO"):
        raise graph.refusal(f"has the layouts {attrs.data_layout} and {attrs.kernel_layout}")
    return graph.node(
        "ConvTranspose",
        [graph.read(operand) for operand in call.args],
        strides=[int(stride) for stride in attrs.strides],
        pads=[int(width) for width in attrs.padding],
        dilations=[int(step) for step in attrs.dilation],
        output_padding=[int(width) for width in attrs.output_padding],
        group=int(attrs.groups),
    )


def _pool(op_type: str) -> Rule:
    def rule(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
        attrs = call.attrs
        if not attrs.layout.startswith("NC"):
            raise graph.refusal(f"has the layout {attrs.layout}")
        x, pads = graph.read(call.args[0]), [int(width) for width in attrs.padding]
        counted = int(attrs.count_include_pad) if op_type == "AveragePool" else 0
        if attrs.ceil_mode:
            # The versions of ONNX disagree on which windows rounding up adds; so many zeros at the end are plain.
            more = _pads_for(call, var)
            if counted:  # what rounding up adds does not count, the padding does
                rank = len(pads) // 2
                around = graph.vector([0, 0, *pads[:rank], 0, 0, *pads[rank:]])
                x = graph.node("Pad", [x, around, graph.scalar(0, var)])
                more = [0] * rank + [max(0, new - old) for new, old in zip(more[rank:], pads[rank:], strict=True)]
            pads, counted = more, 0
        dilation = [int(step) for step in attrs.dilation]
        return graph.node(
            op_type,
            [x],
            kernel_shape=[int(extent) for extent in attrs.pool_size],
            strides=[int(stride) for stride in attrs.strides],
            pads=pads,
            **({"dilations": dilation} if set(dilation) != {1} else {}),  # ONNX Runtime's int8 pool knows none
            **({"count_include_pad": 1} if counted else {}),
        )

    return rule


def _pads_for(pool: relax.Call, var: relax.Var) -> list[int]:
    """The padding with which so many windows, and no more, fit."""
    attrs, before, after = pool.attrs, shape_of(pool.args[0])[2:], shape_of(var)[2:]
    begin = [int(width) for width in attrs.padding][: len(before)]
    end = []
    for axis, (old, new) in enumerate(zip(before, after, strict=True)):
        window = (int(attrs.pool_size[axis]) - 1) * int(attrs.dilation[axis]) + 1
        end.append(max(0, (new - 1) * int(attrs.strides[axis]) + window - old - begin[axis]))
    return [*begin, *end]


def _adaptive_average(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    """Windows of one size, else one axis after the other as a product with a matrix of means."""
    before, after = shape_of(call.args[0])[2:], shape_of(var)[2:]
    value = graph.read(call.args[0])
    if set(after) == {1}:
        return graph.node("GlobalAveragePool", [value])
    if all(old % new == 0 for old, new in zip(before, after, strict=True)):
        window = [old // new for old, new in zip(before, after, strict=True)]
        return graph.node("AveragePool", [value], kernel_shape=window, strides=window)
    for axis, (old, new) in enumerate(zip(before, after, strict=True), 2):
        means = np.zeros((old, new), np.float32)
        for i in range(new):
            first, last = i * old // new, -(-(i + 1) * old // new)
            means[first:last, i] = 1 / (last - first)
        order = list(range(len(before) + 2))
        order[axis], order[-1] = order[-1], order[axis]
        moved = graph.node("Transpose", [value], perm=order)
        averaged = graph.node("MatMul", [moved, graph.constant(means)])
        value = graph.node("Transpose", [averaged], perm=order)
    return value


def _layer_norm(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    first = _trailing_axis(graph, var, call)
    _check_centred_and_scaled(graph, call)
    inputs = [graph.read(operand) for operand in call.args]
    return graph.node("LayerNormalization", inputs, axis=first, epsilon=float(call.attrs.epsilon))


def _rms_norm(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    """Spelled out: ``x / sqrt(mean(x^2) + epsilon) * weight``; ONNX has an operator for it from version 23 on only."""
    first = _trailing_axis(graph, var, call)
    x, weight = (graph.read(operand) for operand in call.args)
    axes = graph.vector(range(first, len(shape_of(var))))
    mean = graph.node("ReduceMean", [graph.node("Mul", [x, x]), axes], keepdims=1)
    shifted = graph.node("Add", [mean, graph.scalar(float(call.attrs.epsilon), var)])
    normal = graph.node("Div", [x, graph.node("Sqrt", [shifted])])
    return graph.node("Mul", [normal, weight])


def _trailing_axis(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> int:
    """The first of the axes that a norm runs over, which must be the last axes."""
    rank = len(shape_of(var))
    axes = sorted(int(axis) % rank for axis in call.attrs.axes)
    if axes != list(range(axes[0], rank)):
        raise graph.refusal(f"normalizes over the axes {axes}, which are not the last ones")
    return axes[0]


def _check_centred_and_scaled(graph: OnnxGraph, call: relax.Call) -> None:
    """A norm without its weight or bias has 1 or 0 there: anything else would be ambiguous."""
    for is_used, operand, neutral in zip((call.attrs.scale, call.attrs.center), call.args[1:3], (1, 0), strict=True):
        value = graph.array(operand)
        if not is_used and (value is None or (value != neutral).any()):
            raise graph.refusal("has a weight or a bias that its attributes leave out")


def _channel_norm(op_type: str) -> Rule:
    """Group and instance norm, over every axis behind the channels."""

    def rule(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
        rank = len(shape_of(var))
        axes = sorted(int(axis) % rank for axis in call.attrs.axes)
        if int(call.attrs.channel_axis) % rank != 1 or axes != list(range(2, rank)):
            raise graph.refusal("does not have its channels at axis 1, or does not normalize over all axes behind")
        _check_centred_and_scaled(graph, call)
        groups = {"num_groups": int(call.attrs.num_groups)} if op_type == "GroupNormalization" else {}
        inputs = [graph.read(operand) for operand in call.args]
        return graph.node(op_type, inputs, epsilon=float(call.attrs.epsilon), **groups)

    return rule


def _batch_norm(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    if int(call.attrs.axis) != 1 or call.attrs.training:
        raise graph.refusal("is in training mode, or does not have its channels at axis 1")
    _check_centred_and_scaled(graph, call)
    inputs = [graph.read(operand) for operand in call.args]
    return graph.node("BatchNormalization", inputs, epsilon=float(call.attrs.epsilon)), "", ""


def _attention(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    """``softmax(q @ k^T * scale + bias) @ v`` of ``[B, T, H, C]``, spelled out with the heads before the tokens."""
    shapes = [shape_of(operand) for operand in call.args]
    if call.attrs.causal_mask is not None or call.attrs.window_size is not None:
        raise graph.refusal("has a mask in its attributes, not in its bias")
    if len({shape[2] for shape in shapes[:3]}) > 1:
        raise graph.refusal("has several heads of queries for one of keys")
    scale = 1 / math.sqrt(shapes[0][3]) if call.attrs.scale is None else float(call.attrs.scale.value)
    q, k, v = (graph.read(operand) for operand in call.args[:3])
    q, v = (graph.node("Transpose", [operand], perm=[0, 2, 1, 3]) for operand in (q, v))
    scores = graph.node("MatMul", [q, graph.node("Transpose", [k], perm=[0, 2, 3, 1])])
    scores = graph.node("Mul", [scores, graph.scalar(scale, var)])
    if len(call.args) > 3:
        scores = graph.node("Add", [scores, graph.read(call.args[3])])
    found = graph.node("MatMul", [graph.node("Softmax", [scores], axis=-1), v])
    return graph.node("Transpose", [found], perm=[0, 2, 1, 3])


def _prelu(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    slope = graph.read(call.args[1])
    behind = len(shape_of(var)) - 1 - int(call.attrs.axis) % len(shape_of(var))
    if behind and shape_of(call.args[1]) != (1,):
        slope = graph.node("Unsqueeze", [slope, graph.vector(range(1, behind + 1))])
    return graph.node("PRelu", [graph.read(call.args[0]), slope])


def _resize(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    attrs = call.attrs
    method, coordinates = str(attrs.method), str(attrs.coordinate_transformation_mode)
    if not attrs.layout.startswith("NC") or coordinates == "tf_crop_and_resize":
        raise graph.refusal(f"has the layout {attrs.layout} and the coordinates {coordinates}")
    sizes = graph.vector(shape_of(var))
    kind = {"coordinate_transformation_mode": coordinates}
    if method == "linear":
        return graph.node("Resize", [graph.read(call.args[0]), "", "", sizes], mode="linear", **kind)
    rounding = str(attrs.rounding_method) or ("round" if coordinates == "align_corners" else "floor")
    if method != "nearest_neighbor" or rounding not in _ROUNDINGS:
        raise graph.refusal(f"resizes by {method}, rounding by {rounding}")
    return graph.node(
        "Resize", [graph.read(call.args[0]), "", "", sizes], mode="nearest", nearest_mode=rounding, **kind
    )


_ROUNDINGS = {"floor", "ceil", "round_prefer_floor", "round_prefer_ceil"}


def _quantization(op_type: str) -> Rule:
    """QuantizeLinear or DequantizeLinear: a zero point of the bytes' type, left out where a weight's is 0."""

    def rule(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
        data, scale_operand, zero_operand = call.args
        scale, zero = graph.array(scale_operand), graph.array(zero_operand)
        if scale is None or zero is None:
            raise graph.refusal("has a scale or a zero point that is computed while running")
        stored = dtype_of(var if op_type == "QuantizeLinear" else data)
        per_channel = {"axis": int(call.attrs.axis) % len(shape_of(data))} if scale.size > 1 else {}
        inputs = [graph.read(data)]
        if scale.size > 1 and isinstance(scale_operand, relax.Var):
            inputs.append(graph.read(scale_operand))
        else:
            inputs.append(graph.constant(scale if scale.size > 1 else scale.reshape(())))
        is_symmetric = scale.size > 1 and not zero.any() and op_type == "DequantizeLinear"
        if not is_symmetric:
            shape = scale.shape if scale.size > 1 else ()
            inputs.append(
                graph.constant(np.broadcast_to(zero.reshape(-1), (scale.size,)).astype(stored).reshape(shape))
            )
        return graph.node(op_type, inputs, **per_channel)

    return rule


LAYERS: dict[str, Rule] = {
    **dict.fromkeys(("nn.conv1d", "nn.conv2d", "nn.conv3d"), _conv),
    **dict.fromkeys(("nn.conv1d_transpose", "nn.conv2d_transpose", "nn.conv3d_transpose"), _conv_transpose),
    **dict.fromkeys(("nn.max_pool1d", "nn.max_pool2d", "nn.max_pool3d"), _pool("MaxPool")),
    **dict.fromkeys(("nn.avg_pool1d", "nn.avg_pool2d", "nn.avg_pool3d"), _pool("AveragePool")),
    **dict.fromkeys(("nn.adaptive_avg_pool1d", "nn.adaptive_avg_pool2d", "nn.adaptive_avg_pool3d"), _adaptive_average),
    "nn.layer_norm": _layer_norm,
    "nn.rms_norm": _rms_norm,
    "nn.group_norm": _channel_norm("GroupNormalization"),
    "nn.instance_norm": _channel_norm("InstanceNormalization"),
    "nn.batch_norm": _batch_norm,
    "nn.attention": _attention,
    "nn.attention_bias": _attention,
    "nn.prelu": _prelu,
    "image.resize2d": _resize,
    "image.resize3d": _resize,
    "quantize": _quantization("QuantizeLinear"),
    "dequantize": _quantization("DequantizeLinear"),
}
