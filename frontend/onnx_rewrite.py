"""Older and implicit ONNX forms, rewritten to the one explicit form that is converted; one function an operator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from pumice.errors import UnsupportedError
from pumice.frontend.onnx_graph import Graph, attributes_of, operand, set_attributes


def rewrite_forms(graph: Graph) -> Graph:
    """``Upsample -> Resize``, ``Slice(starts=...) -> Slice(x, starts)``, ``auto_pad -> pads``, ..., in place.

    Needs the types of all values. Raises UnsupportedError for a form that has no explicit equal.
    """
    for node in graph.nodes:
        if rewrite := _REWRITES.get(node.op_type):
            rewrite(graph, node)
    return graph


def _slice(graph: Graph, node: onnx.NodeProto) -> None:
    """Before version 10 the bounds were attributes."""
    values = attributes_of(node)
    if "starts" not in values:
        return
    axes = values.get("axes", range(len(values["starts"])))
    bounds = {"starts": values["starts"], "ends": values["ends"], "axes": axes}
    for what, numbers in bounds.items():
        node.input.append(graph.add_constant(f"{node.output[0]}.{what}", np.array(list(numbers), np.int64)))
    set_attributes(node, starts=None, ends=None, axes=None)


def _upsample(graph: Graph, node: onnx.NodeProto) -> None:
    """Upsample and the first Resize (version 10): no region, and what later versions call asymmetric and floor."""
    if node.op_type == "Resize" and graph.opset > 10:
        return
    mode = attributes_of(node).get("mode", "nearest")
    scales = operand(node, 1)
    if scales not in graph.constants:
        raise UnsupportedError(f"The {graph.where(node)} is not supported: its scales are not constant.")
    node.op_type = "Resize"
    node.input[1:] = ["", scales]
    set_attributes(node, mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="floor", width_scale=None)


def _resize(graph: Graph, node: onnx.NodeProto) -> None:
    """Empty scales or region mean none; explicit sizes leave no rounding to the importer."""
    _upsample(graph, node)
    if any(name and name not in graph.constants for name in node.input[1:]):
        raise UnsupportedError(f"The {graph.where(node)} is not supported: its sizes are not constant.")
    for position in (1, 2, 3):
        name = operand(node, position)
        if name and not graph.constants[name].size:
            node.input[position] = ""


def _explicit_pads(graph: Graph, node: onnx.NodeProto) -> None:
    """``auto_pad`` as the pads that it means for this input."""
    values = attributes_of(node)
    mode = values.get("auto_pad", "NOTSET")
    spatial = graph.types[node.input[0]].shape[2:]
    rank = len(spatial)
    kernel = values.get("kernel_shape") or graph.types[node.input[1]].shape[2:]
    strides, dilations = values.get("strides", [1] * rank), values.get("dilations", [1] * rank)
    set_attributes(node, auto_pad=None, kernel_shape=list(kernel), strides=list(strides), dilations=list(dilations))
    if mode in {"NOTSET", ""}:
        set_attributes(node, pads=list(values.get("pads", [0] * 2 * rank)))
        return
    totals = [0] * rank
    if mode != "VALID":
        totals = [
            max((-(-size // stride) - 1) * stride + (extent - 1) * dilation + 1 - size, 0)
            for size, extent, stride, dilation in zip(spatial, kernel, strides, dilations, strict=True)
        ]
    set_attributes(node, pads=_split(totals, mode))


def _transposed_pads(graph: Graph, node: onnx.NodeProto) -> None:
    """ConvTranspose: ``output_shape`` and ``auto_pad`` as pads."""
    values = attributes_of(node)
    mode = values.get("auto_pad", "NOTSET")
    spatial = graph.types[node.input[0]].shape[2:]
    result = graph.types[node.output[0]].shape[2:]
    rank = len(spatial)
    kernel = values.get("kernel_shape") or graph.types[node.input[1]].shape[2:]
    strides, dilations = values.get("strides", [1] * rank), values.get("dilations", [1] * rank)
    extra = values.get("output_padding", [0] * rank)
    if values.get("output_shape") or mode not in {"NOTSET", ""}:
        totals = [
            stride * (size - 1) + more + (extent - 1) * dilation + 1 - out
            for size, out, extent, stride, dilation, more in zip(
                spatial, result, kernel, strides, dilations, extra, strict=True
            )
        ]
        if min(totals) < 0:
            raise UnsupportedError(f"The {graph.where(node)} is not supported: it would pad its result.")
        # The standard gives the odd one to the end for SAME_UPPER only, and to the start for every other mode.
        pads = _split(totals, "SAME_UPPER" if mode == "SAME_UPPER" else "SAME_LOWER")
    else:
        pads = list(values.get("pads", [0] * 2 * rank))
    set_attributes(
        node, auto_pad=None, output_shape=None, kernel_shape=list(kernel), strides=list(strides),
        dilations=list(dilations), pads=pads,
    )  # fmt: skip


def _split(totals: list[int], mode: str) -> list[int]:
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return large + small if mode == "SAME_LOWER" else small + large


_REWRITES: dict[str, Callable[[Graph, onnx.NodeProto], None]] = {
    "AveragePool": _explicit_pads,
    "Conv": _explicit_pads,
    "ConvTranspose": _transposed_pads,
    "LpPool": _explicit_pads,
    "MaxPool": _explicit_pads,
    "Resize": _resize,
    "Slice": _slice,
    "Upsample": _resize,
}
