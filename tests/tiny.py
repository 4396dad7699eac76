"""A tiny network as an ONNX model: two convolutions, pooling, a linear layer; 1x4 blocks of zeros on demand."""

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper


def tiny_onnx(batch="N", channels=1, size=8, zero=0.0, seed=0, image="image", logits="logits") -> ModelProto:
    rng = np.random.default_rng(seed)
    weights = {
        "stem.weight": rng.normal(size=(16, channels, 3, 3), scale=0.5),
        "conv.weight": rng.normal(size=(16, 16, 3, 3), scale=0.1),
        "conv.bias": rng.normal(size=16, scale=0.1),
        "fc.weight": rng.normal(size=(10, 16), scale=0.3),
        "fc.bias": rng.normal(size=10, scale=0.1),
    }
    weights["conv.weight"][np.repeat(rng.random((16, 4, 3, 3)) < zero, 4, axis=1)] = 0
    nodes = [
        helper.make_node("Conv", [image, "stem.weight"], ["stem"], kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Relu", ["stem"], ["relu1"]),
        helper.make_node("Conv", ["relu1", "conv.weight", "conv.bias"], ["conv"], kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Relu", ["conv"], ["relu2"]),
        helper.make_node("GlobalAveragePool", ["relu2"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], [logits], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(image, TensorProto.FLOAT, [batch, channels, size, size])],
        [helper.make_tensor_value_info(logits, TensorProto.FLOAT, [batch, 10])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
