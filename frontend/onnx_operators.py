"""Which ONNX operators are compiled, and under which conditions; everything else is refused by name.

Measured, not assumed: tests/conformance runs ONNX's own operator cases. A condition stands here where TVM's
importer or its code would give other numbers than ONNX asks for.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx

from pumice.errors import UnsupportedError
from pumice.frontend.onnx_graph import Graph, attributes_of, operand, quote

_ALLOWED = """
    Conv ConvTranspose Gemm MatMul Einsum
    BatchNormalization GroupNormalization InstanceNormalization LayerNormalization LRN
    MeanVarianceNormalization RMSNormalization
    AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool
    Clip Elu Gelu HardSigmoid HardSwish Hardmax LeakyRelu LogSoftmax Mish PRelu Relu Selu Shrink Sigmoid
    Softmax Softplus Softsign Tanh ThresholdedRelu
    Abs Acos Acosh Add And Asin Asinh Atan Atanh Ceil Cos Cosh Div Equal Erf Exp Floor Greater GreaterOrEqual
    IsInf IsNaN Less LessOrEqual Log Max Mean Min Mod Mul Neg Not Or Pow Reciprocal Round Sign Sin Sinh Sqrt Sub
    Sum Tan Where Xor
    ArgMax ArgMin CumSum ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum ReduceSumSquare
    Cast CastLike Concat DepthToSpace Expand Flatten Gather GatherElements GatherND Identity Pad Reshape Resize
    Slice SpaceToDepth Split Squeeze Tile Transpose Trilu Unsqueeze
    QuantizeLinear DequantizeLinear
"""
ALLOWED = frozenset(_ALLOWED.split())

# Gone once constants are folded and older forms are rewritten.
_TEMPORARY = """
    Constant ConstantOfShape Dropout EyeLike NonZero OneHot Range Shape Size Upsample
    QLinearConv QLinearMatMul ConvInteger MatMulInteger
"""
TEMPORARY = frozenset(_TEMPORARY.split())

# Replaced by the definition that the ONNX standard itself gives in terms of simpler operators.
EXPANDED = frozenset({"Attention", "Celu", "RotaryEmbedding", "Swish"})

_DTYPES = {"float32", "int8", "uint8", "int32", "int64", "bool"}
_REASONS = {
    "If": "a branch is chosen while running",
    "Loop": "loops are not compiled",
    "Scan": "loops are not compiled",
    "DynamicQuantizeLinear": "scales are fixed at compile time; give the float model, or quantize it statically",
    "LSTM": "recurrent layers are not compiled",
    "GRU": "recurrent layers are not compiled",
    "RNN": "recurrent layers are not compiled",
    "TopK": "it needs a sort that the compiled library does not carry",
    "NonMaxSuppression": "the shape of its result depends on the data; leave it outside of the exported model",
}


def check_known(graph: Graph) -> None:
    """Refuse the operators that can never be compiled, before anything is computed."""
    for node in graph.nodes:
        if node.op_type not in ALLOWED | TEMPORARY | EXPANDED:
            reason = _REASONS.get(node.op_type, "it is not among those that are known to compile right")
            raise UnsupportedError(f"The {graph.where(node)} is not supported: {reason}.")


def check_operators(graph: Graph) -> None:
    """Refuse what is left in a folded and rewritten graph that would not compile right."""
    for node in graph.nodes:
        reason = _refusal(graph, node)
        if reason:
            raise UnsupportedError(f"The {graph.where(node)} is not supported: {reason}.")


def _refusal(graph: Graph, node: onnx.NodeProto) -> str | None:
    if node.op_type == "Dropout":
        return "it is in training mode, or its mask is read; export the model for inference"
    if node.op_type not in ALLOWED:
        return "its operands are not constant"
    if len(node.output) > 1 and node.op_type != "Split":
        return f"its result no. {len(node.output)} is read, and only the first is computed"
    for name in [*node.input, *node.output]:
        if name and graph.types[name].dtype not in _DTYPES:
            return f"{quote(name)} is {graph.types[name].dtype}; export the model in float32"
        if name and name not in graph.constants and 0 in graph.types[name].shape:
            return f"{quote(name)} has no elements (shape {list(graph.types[name].shape)})"
    condition = _CONDITIONS.get(node.op_type)
    return condition(graph, node) if condition else None


def _batch_normalization(graph: Graph, node: onnx.NodeProto) -> str | None:
    return "it is in training mode" if attributes_of(node).get("training_mode", 0) else None


def _is_inf(graph: Graph, node: onnx.NodeProto) -> str | None:
    values = attributes_of(node)
    both = values.get("detect_negative", 1) and values.get("detect_positive", 1)
    return None if both else "it looks for one sign of infinity only"


def _lrn(graph: Graph, node: onnx.NodeProto) -> str | None:
    return "its window is even, so not centred" if attributes_of(node)["size"] % 2 == 0 else None


def _mod(graph: Graph, node: onnx.NodeProto) -> str | None:
    floating = graph.types[node.input[0]].dtype == "float32"
    return "a float remainder without fmod" if floating and not attributes_of(node).get("fmod", 0) else None


def _power(graph: Graph, node: onnx.NodeProto) -> str | None:
    if graph.types[node.input[0]].dtype != "float32":
        return "its base is not float32"
    same = graph.types[node.input[1]].dtype == "float32" or node.input[1] in graph.constants
    return None if same else "its exponent is computed, and not float32"


def _not_bool(graph: Graph, node: onnx.NodeProto) -> str | None:
    return "it reduces truth values" if graph.types[node.input[0]].dtype == "bool" else None


def _rms_normalization(graph: Graph, node: onnx.NodeProto) -> str | None:
    whole = attributes_of(node).get("axis", -1) % len(graph.types[node.input[0]].shape) == 0
    return "it normalizes over every axis, the batch included" if whole else None


def _space_to_depth(graph: Graph, node: onnx.NodeProto) -> str | None:
    return None if attributes_of(node).get("mode", "DCR") == "DCR" else "its mode is not DCR"


def _resize(graph: Graph, node: onnx.NodeProto) -> str | None:
    values = attributes_of(node)
    before, after = graph.types[node.input[0]].shape, graph.types[node.output[0]].shape
    if len(before) not in {3, 4, 5} or before[:2] != after[:2]:
        return "it resizes other axes than the spatial ones of a 1 to 3-dimensional image"
    mode, coordinates = values.get("mode", "nearest"), values.get("coordinate_transformation_mode", "half_pixel")
    if mode not in {"nearest", "linear"}:
        return f"its mode is {mode}, and nearest and linear are supported"
    if coordinates not in {"half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"}:
        return f"its coordinate transformation is {coordinates}"
    if coordinates != "half_pixel" and 1 in after[2:]:
        return f"it makes an axis of one element by {coordinates}"
    if (
        values.get("antialias", 0)
        or values.get("axes")
        or values.get("keep_aspect_ratio_policy", "stretch") != "stretch"
    ):
        return "it uses antialias, axes or keep_aspect_ratio_policy"
    scales = operand(node, 2)
    if scales and graph.constants[scales].size and coordinates != "align_corners":
        # TVM derives the scale from the two sizes; ONNX computes with the scale given.
        given = graph.constants[scales].astype(float)
        if any(abs(new - old * scale) > 1e-4 for old, new, scale in zip(before, after, given, strict=True)):
            return "its scales do not give whole sizes; give sizes instead"
    return None


_CONDITIONS: dict[str, Callable[[Graph, onnx.NodeProto], str | None]] = {
    "BatchNormalization": _batch_normalization,
    "IsInf": _is_inf,
    "LRN": _lrn,
    "Mod": _mod,
    "Pow": _power,
    "ReduceMax": _not_bool,
    "ReduceMin": _not_bool,
    "RMSNormalization": _rms_normalization,
    "Resize": _resize,
    "SpaceToDepth": _space_to_depth,
}
