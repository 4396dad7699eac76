"""An ONNX graph under construction: what the rules for the single operators read from and write to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from tvm import relax, tirx
from tvm.ir import GenericConst, IRModule

from pumice.errors import UnsupportedError
from pumice.module import output_names_of, source_of, weights_of
from pumice.passes.dataflow import Dataflow, operator_name
from pumice.passes.numpy_operators import plain

# The name of a tensor; of each, where an operator makes several ('' for one that ONNX does not give).
Value = str | tuple[str, ...]

OPSET = 21
IR_VERSION = 10


class OnnxGraph:
    """Nodes and initializers, each name once; weights keep the names that they have in the module."""

    def __init__(self, mod: IRModule) -> None:
        self.source = source_of(mod)
        self._mod = mod
        self.flow = Dataflow(mod)
        self.values: dict[relax.Var, Value] = {var: str(var.name) for var in self.flow.inputs}
        self._label = ""  # of what is being written: new names begin with it
        self._place = ""  # the same as messages call it
        self._weights = weights_of(mod)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, np.ndarray] = {}
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._taken = {*map(str, self.values.values()), *output_names_of(mod), *self._weights}

    def begin(self, var: relax.Var, value: relax.Expr, label: str) -> None:
        """What rules read and write from here on belongs to this binding; ``label`` is what their names begin with."""
        self._label = label
        self._place = f"{operator_name(value) or type(value).__name__} '{var.name}'"

    # What rules read

    def read(self, operand: relax.Expr) -> str:
        """The name of a tensor operand; a weight or a constant becomes an initializer."""
        if isinstance(operand, relax.Var) and operand in self.values:
            value = self.values[operand]
            if not isinstance(value, str) or not value:
                raise self.refusal("reads a result that ONNX does not give")
            return value
        array = self.array(operand)
        if array is None:
            raise self.refusal(f"reads {operand}, whose value is not known")
        if isinstance(operand, relax.Var) and operand.name not in self._constants:  # else it is there in another form
            self._constants[operand.name] = array
            self.values[operand] = str(operand.name)
            return str(operand.name)
        return self.constant(array)

    def array(self, operand: relax.Expr) -> np.ndarray | None:
        """The value of a weight or constant; None for what is computed."""
        if isinstance(operand, GenericConst):
            return operand.value.numpy() if isinstance(operand.ty, relax.TensorType) else None
        return self._weights.get(operand.name) if isinstance(operand, relax.Var) else None

    def integers(self, operand: relax.Expr) -> list[int]:
        """A shape, a tuple of numbers or a constant vector of the graph."""
        if isinstance(operand, relax.Tuple):
            numbers = [plain(field) for field in operand.fields]
        else:
            value = plain(operand)
            numbers = [] if value is None else list(np.ravel(value))
        if None in numbers:
            raise self.refusal("has a shape or an index that is computed while running")
        return [int(number) for number in numbers]

    def function(self, called: relax.Expr) -> tirx.PrimFunc:
        """The function that a call names."""
        return self._mod[called]

    def refusal(self, why: str) -> UnsupportedError:
        """The error for what is being written, to be raised."""
        return UnsupportedError(
            f"{self.source}: {self._place} cannot be written as ONNX: it {why}; compile without --emit-onnx"
        )

    # What rules write

    def node(self, op_type: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node with one result; gives the result's name."""
        return self.nodes(op_type, inputs, 1, **attributes)[0]

    def nodes(self, op_type: str, inputs: Sequence[str], count: int, **attributes: Any) -> tuple[str, ...]:
        """Add a node with several results; gives their names."""
        outputs = [self._unique(self._label) for _ in range(count)]
        self._nodes.append(helper.make_node(op_type, list(inputs), outputs, name=outputs[0], **attributes))
        return tuple(outputs)

    def constant(self, value: np.ndarray, name: str = "") -> str:
        """An initializer: the one that is there already with the same content, or a new one called ``name``."""
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._known:
            is_free = name in self._weights and name not in self._constants  # a weight keeps its own name
            self._known[key] = name if is_free else self._unique(name or f"{self._label}.constant")
            self._constants[self._known[key]] = value
        return self._known[key]

    def vector(self, values: Iterable[int]) -> str:
        """A constant int64 vector, such as a shape or axes."""
        return self.constant(np.array(list(values), np.int64))

    def scalar(self, value: float, like: relax.Expr) -> str:
        """A constant number of the element type of ``like``."""
        return self.constant(np.array(value, str(like.ty.dtype)))

    # The result

    def finish(self, outputs: Sequence[tuple[str, relax.Expr]]) -> onnx.GraphProto:
        """The graph whose outputs are these expressions, under these names."""
        self._place = "the result"
        produced = {name for node in self._nodes for name in node.output}
        renamed: dict[str, str] = {}
        copies = []
        for name, result in outputs:
            value = self.read(result)
            if value in produced and value not in renamed:
                renamed[value] = name
            elif value != name:  # an input or a weight, or a value that has another output's name
                copies.append(helper.make_node("Identity", [renamed.get(value, value)], [name], name=name))
        for node in self._nodes:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [renamed.get(name, name) for name in node.output]
        named = {renamed.get(value, value): var for var, value in self.values.items() if isinstance(value, str)}
        known = {*renamed.values(), *produced} - {name for name, _ in outputs}
        return helper.make_graph(
            [*self._nodes, *copies],
            self.source,
            [_info(str(var.name), var) for var in self.flow.inputs],
            [_info(name, result) for name, result in outputs],
            [
                numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)
                for name, value in self._constants.items()
            ],
            value_info=[_info(name, var) for name, var in named.items() if name in known],
        )

    @property
    def size(self) -> int:
        """Bytes of all initializers."""
        return sum(value.nbytes for value in self._constants.values())

    def _unique(self, name: str) -> str:
        unique, count = name, 0
        while unique in self._taken:
            count += 1
            unique = f"{name}_{count}"
        self._taken.add(unique)
        return unique


def _info(name: str, tensor: relax.Expr) -> onnx.ValueInfoProto:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(str(tensor.ty.dtype)))
    return helper.make_tensor_value_info(name, element, [int(extent) for extent in tensor.ty.shape])
