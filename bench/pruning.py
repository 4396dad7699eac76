"""Holes for the speed benchmarks, made in the ONNX model itself, so that every engine reads the same weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper

BLOCK = 4


def prune_blocks(model: onnx.ModelProto, share: float, pointwise_only: bool = False) -> onnx.ModelProto:
    """A copy in which this share of the 1x4 blocks of each weight is zero, the smallest by sum of magnitudes.

    A block is one output channel by four neighbouring input channels at one kernel position. Pruned are the weights
    of convolutions and matrix products whose input channels are a multiple of four, neither grouped convolutions nor
    the first layer of a network; with ``pointwise_only`` no kernel larger than 1 x 1. What is left of a layer is
    scaled up to the norm that it had: the network was not trained, and its signal would fade.
    """
    pruned = onnx.ModelProto()
    pruned.CopyFrom(model)
    if share:
        for tensor, axis in _weights(pruned, pointwise_only):
            weight = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(_prune(weight, axis, share), tensor.name))
    return pruned


def _weights(model: onnx.ModelProto, pointwise_only: bool) -> Iterator[tuple[onnx.TensorProto, int]]:
    """The weights to prune, each once, and the axis of their input channels."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type not in ("Conv", "MatMul", "Gemm") or attributes.get("group", 1) != 1:
            continue
        tensor = tensors.pop(node.input[1], None)
        if tensor is None:
            continue
        axis = 1 if node.op_type == "Conv" or attributes.get("transB") else 0
        is_pointwise = all(size == 1 for size in tensor.dims[2:])
        if tensor.dims[axis] % BLOCK == 0 and (is_pointwise or not pointwise_only):
            yield tensor, axis


def _prune(weight: np.ndarray, axis: int, share: float) -> np.ndarray:
    channels_last = np.moveaxis(weight, axis, -1)
    blocks = channels_last.reshape(*channels_last.shape[:-1], -1, BLOCK)
    scores = np.abs(blocks).sum(-1)
    keep = np.ones(scores.size, bool)
    keep[np.argsort(scores, axis=None, kind="stable")[: round(share * scores.size)]] = False
    kept = blocks * keep.reshape(scores.shape)[..., None]
    kept = kept * (np.linalg.norm(blocks) / np.linalg.norm(kept))
    return np.ascontiguousarray(np.moveaxis(kept.reshape(channels_last.shape), -1, axis), weight.dtype)
