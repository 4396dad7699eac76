"""Readable names for the weights that an exporter left anonymous (``onnx::MatMul_249``, ``val_12``)."""

from __future__ import annotations

import re

import onnx

from pumice.frontend.onnx_graph import Graph

# What torch's two exporters and plain numbering write; any other name is the author's and is kept.
_ANONYMOUS = re.compile(r"onnx::\w+|val_\d+|_?v?\d+")

_WEIGHT_DTYPES = {"float32", "int8", "uint8", "int32"}


def name_weights(graph: Graph) -> Graph:
    """``MatMul(x, onnx::MatMul_249) + layers.0.q.bias  ->  the weight is named layers.0.q.weight``.

    Without such a bias, from the module path that the exporter wrote on the node. Names stay unique.
    """
    readers = graph.consumers()
    renames: dict[str, str] = {}
    for name, value in graph.constants.items():
        if _ANONYMOUS.fullmatch(name) and value.ndim > 0 and value.dtype.name in _WEIGHT_DTYPES and readers.get(name):
            node, position = readers[name][0]
            if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
                if position > 0 or not readers.get(node.output[0]):
                    continue
                node, position = readers[node.output[0]][0]
            path = _bias_path(node, readers) if position == 1 else ""
            path = path or _scope_path(node) or _name_path(node)
            wanted = f"{path}.{'bias' if position == 2 or node.op_type == 'Add' else 'weight'}"
            if path and wanted not in graph.types and wanted not in renames.values():
                renames[name] = wanted
    _rename(graph, renames)
    return graph


def _bias_path(node: onnx.NodeProto, readers: dict[str, list[tuple[onnx.NodeProto, int]]]) -> str:
    """The path in the name of the bias that is added to this node's result."""
    others = [*node.input[2:3]]
    if node.op_type == "MatMul":
        others += [
            name for reader, _ in readers.get(node.output[0], []) if reader.op_type == "Add" for name in reader.input
        ]
    return next((name.removesuffix(".bias") for name in others if name.endswith(".bias")), "")


def _scope_path(node: onnx.NodeProto) -> str:
    """``['', 'encoder', 'encoder.fc1', 'linear'] -> encoder.fc1`` (torch's current exporter)."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = re.findall(r"'([^']*)'", entry.value)
            return scopes[-2] if len(scopes) > 1 else ""
    return ""


def _name_path(node: onnx.NodeProto) -> str:
    """``/stem/stem.0/Conv -> stem.0`` (torch's older exporter repeats the parent in a child's name)."""
    path = ""
    for part in node.name.strip("/").split("/")[:-1]:
        parent = path.rsplit(".", 1)[-1]
        path = f"{path}{part.removeprefix(parent)}" if parent and part.startswith(f"{parent}.") else f"{path}.{part}"
    return path.strip(".")


def _rename(graph: Graph, renames: dict[str, str]) -> None:
    for node in graph.nodes:
        for position, name in enumerate(node.input):
            node.input[position] = renames.get(name, name)
    graph.constants = {renames.get(name, name): value for name, value in graph.constants.items()}
    graph.types = {renames.get(name, name): type_ for name, type_ in graph.types.items()}
