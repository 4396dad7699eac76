"""An ONNX graph in plain Python: nodes in order, constants as arrays, and the static type of every value.

The stages of the importer (check, fold, rewrite, convert) pass this along instead of a protobuf, so that a
weight is never copied or serialized on the way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper

# Structural operands: read while importing, so they become literals of the module and not parameters.
STRUCTURAL_OPERANDS = {
    "Clip": {1, 2},
    "CumSum": {1},
    "DequantizeLinear": {2},
    "Expand": {1},
    "Pad": {1, 2, 3},
    "Pow": {1},
    "QuantizeLinear": {2},
    "Reshape": {1},
    "Resize": {1, 2, 3},
    "Slice": {1, 2, 3, 4},
    "Split": {1},
    "Squeeze": {1},
    "Tile": {1},
    "Trilu": {1},
    "Unsqueeze": {1},
}


@dataclass(frozen=True)
class TensorType:
    """A static tensor type: numpy's name of the element type, and the extents."""

    dtype: str
    shape: tuple[int, ...]

    def to_proto(self) -> onnx.TypeProto:
        """The same as ONNX spells it."""
        element = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        return helper.make_tensor_type_proto(element, self.shape)

    @classmethod
    def of(cls, array: np.ndarray) -> TensorType:
        """The type of an array."""
        return cls(array.dtype.name, tuple(array.shape))


@dataclass
class Graph:
    """One ONNX graph; each stage returns it changed.

    ``derived`` names the constants that were computed here and are in no file.
    """

    source: str
    opset: int
    inputs: dict[str, TensorType]
    outputs: list[str]
    nodes: list[onnx.NodeProto]
    constants: dict[str, np.ndarray]
    types: dict[str, TensorType] = field(default_factory=dict)
    derived: set[str] = field(default_factory=set)

    def where(self, node: onnx.NodeProto) -> str:
        """How messages call a node: ``Conv node 'conv1' of model.onnx``."""
        outputs = [name for name in node.output if name]
        name = node.name or (outputs[0] if outputs else "")
        return f"{quote(node.op_type)[1:-1]} node {quote(name)} of {self.source}"

    def consumers(self) -> dict[str, list[tuple[onnx.NodeProto, int]]]:
        """For every value, the nodes that read it and at which operand."""
        readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in self.nodes:
            for position, name in enumerate(node.input):
                if name:
                    readers.setdefault(name, []).append((node, position))
        return readers

    def add_constant(self, name: str, value: np.ndarray) -> str:
        """Add a constant under a name derived from ``name`` that nothing else has; returns the name."""
        fresh, count = name, 0
        while fresh in self.constants or fresh in self.types:
            count += 1
            fresh = f"{name}_{count}"
        self.constants[fresh] = value
        self.types[fresh] = TensorType.of(value)
        self.derived.add(fresh)
        return fresh

    def prune(self) -> None:
        """Drop the nodes whose results nobody reads, unread trailing results, and unread constants."""
        needed = set(self.outputs)
        kept = []
        for node in reversed(self.nodes):
            if not any(name in needed for name in node.output):
                continue
            while node.output and node.output[-1] not in needed:
                del node.output[-1]
            needed.update(node.input)
            kept.append(node)
        self.nodes = kept[::-1]
        self.constants = {name: value for name, value in self.constants.items() if name in needed}


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node as Python values; strings as str."""
    values = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        values[attribute.name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return values


def set_attributes(node: onnx.NodeProto, **changes: Any) -> None:
    """Set attributes in place; ``None`` removes one."""
    kept = [attribute for attribute in node.attribute if attribute.name not in changes]
    added = [helper.make_attribute(name, value) for name, value in changes.items() if value is not None]
    del node.attribute[:]
    node.attribute.extend(kept + added)


def operand(node: onnx.NodeProto, position: int) -> str:
    """The name of an operand, or '' where the node leaves it out."""
    return node.input[position] if position < len(node.input) else ""


def quote(name: str, longest: int = 80) -> str:
    """A name for a message: control characters escaped, and cut when very long."""
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name[: longest + 1])
    return f"'{printable}'" if len(name) <= longest else f"'{printable[:longest]}...'"


def times(shape: Iterable[int | str]) -> str:
    """A shape as the command line writes it: ``1x3x224x224``."""
    return "x".join(str(extent) for extent in shape)
