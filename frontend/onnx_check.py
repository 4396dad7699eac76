"""From a parsed ONNX model to a Graph that is sound: every value defined once, before it is read, of a static type."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from pumice.errors import ModelError, UnsupportedError, UsageError
from pumice.frontend.onnx_file import read_sparse_tensor, read_tensor
from pumice.frontend.onnx_graph import Graph, TensorType, quote, times

OLDEST_OPSET = 9
NEWEST_OPSET = 28  # the newest that the operator tests in tests/conformance cover
_STANDARD_DOMAINS = {"", "ai.onnx"}
_INPUT_DTYPES = {"float32", "int8", "uint8", "int32", "int64", "bool"}
_ELEMENT_LIMIT = 2**33


def build_graph(
    model: onnx.ModelProto, source: str, folder: Path | None, inputs: Mapping[str, Sequence[int]] | None
) -> Graph:
    """The model as a Graph with its inputs pinned to static shapes.

    ``inputs`` gives the shapes of the inputs that the model leaves open, by name. Raises ModelError for a
    graph that contradicts itself, UnsupportedError for an operator set or domain that is not known here,
    UsageError when ``inputs`` does not fit the model.
    """
    opset = _opset_of(model, source)
    if model.functions:
        model = _inline_functions(model, source)
    constants = _constants_of(model.graph, source, folder)
    graph = Graph(
        source=source,
        opset=opset,
        inputs=_pin_inputs(model.graph, constants, source, inputs or {}),
        outputs=[output.name for output in model.graph.output],
        nodes=[_copy(node) for node in model.graph.node],
        constants=constants,
    )
    _check_nodes(graph)
    return graph


def _opset_of(model: onnx.ModelProto, source: str) -> int:
    versions = [entry.version for entry in model.opset_import if entry.domain in _STANDARD_DOMAINS]
    if not versions:
        raise ModelError(f"{source} declares no version of the standard ONNX operators; export it again.")
    if versions[0] < OLDEST_OPSET:
        raise UnsupportedError(
            f"{source} uses version {versions[0]} of the ONNX operators, and the oldest that can be compiled is "
            f"{OLDEST_OPSET}; convert it with onnx.version_converter, or export it again."
        )
    if versions[0] > NEWEST_OPSET:
        raise UnsupportedError(
            f"{source} uses version {versions[0]} of the ONNX operators, and the newest known here is "
            f"{NEWEST_OPSET}; export it with opset_version={NEWEST_OPSET} or lower."
        )
    return int(versions[0])


def _inline_functions(model: onnx.ModelProto, source: str) -> onnx.ModelProto:
    try:
        return onnx.inliner.inline_local_functions(model)
    except Exception as error:
        raise ModelError(f"The functions of {source} cannot be expanded: {_first_line(error)}.") from error


def _constants_of(graph: onnx.GraphProto, source: str, folder: Path | None) -> dict[str, np.ndarray]:
    constants: dict[str, np.ndarray] = {}
    for tensor in graph.initializer:
        _add_once(constants, tensor.name, read_tensor(tensor, source, folder), source)
    for sparse in graph.sparse_initializer:
        _add_once(constants, sparse.values.name, read_sparse_tensor(sparse, source, folder), source)
    return constants


def _add_once(constants: dict[str, np.ndarray], name: str, value: np.ndarray, source: str) -> None:
    if not name:
        raise ModelError(f"{source} has an initializer without a name; the file is damaged.")
    if name in constants:
        raise ModelError(f"{source} has two initializers named {quote(name)}; the file is damaged.")
    constants[name] = value


def _pin_inputs(
    graph: onnx.GraphProto, constants: dict[str, np.ndarray], source: str, pinned: Mapping[str, Sequence[int]]
) -> dict[str, TensorType]:
    # An input that is also an initializer is a weight with a default value (the rule before IR version 4).
    declared = [value for value in graph.input if value.name not in constants]
    names = [value.name for value in declared]
    for name in pinned:
        if name not in names:
            known = ", ".join(quote(n) for n in names) or "none"
            raise UsageError(f"{source} has no input {quote(name)}; its inputs are: {known}.")
    if len(set(names)) != len(names):
        raise ModelError(f"{source} declares two inputs of one name; the file is damaged.")
    symbols: dict[str, int] = {}
    for value in declared:
        if value.name in pinned:
            _bind_symbols(value, tuple(int(e) for e in pinned[value.name]), symbols, source)
    return {value.name: _input_type(value, pinned.get(value.name), symbols, source) for value in declared}


def _bind_symbols(value: onnx.ValueInfoProto, shape: tuple[int, ...], symbols: dict[str, int], source: str) -> None:
    """Check a given shape against the declared one, and note what it makes of the named dimensions."""
    place = f"The shape {times(shape) or '()'} given for input {quote(value.name)} of {source}"
    if any(extent < 1 for extent in shape):
        raise UsageError(f"{place} has an extent below 1.")
    if not value.type.tensor_type.HasField("shape"):
        return
    declared = _declared(value)
    fits = len(declared) == len(shape) and all(
        isinstance(d, str) or d == e for d, e in zip(declared, shape, strict=True)
    )
    if not fits:
        raise UsageError(f"{place} does not fit the declared {times(declared) or 'scalar'}.")
    for extent, given in zip(declared, shape, strict=True):
        if isinstance(extent, str) and extent != "?" and symbols.setdefault(extent, given) != given:
            raise UsageError(f"{place} makes the dimension {quote(extent)} {given}, elsewhere it is {symbols[extent]}.")


def _input_type(
    value: onnx.ValueInfoProto, given: Sequence[int] | None, symbols: dict[str, int], source: str
) -> TensorType:
    place = f"The input {quote(value.name)} of {source}"
    if not value.type.HasField("tensor_type"):
        raise UnsupportedError(f"{place} is not a tensor; only tensors can be compiled.")
    element = value.type.tensor_type.elem_type
    if element not in TensorProto.DataType.values() or element in {TensorProto.UNDEFINED, TensorProto.STRING}:
        raise UnsupportedError(f"{place} has no numeric element type.")
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(element)).name
    if dtype not in _INPUT_DTYPES:
        raise UnsupportedError(f"{place} is {dtype}; export the model with one of {', '.join(sorted(_INPUT_DTYPES))}.")
    if given is not None:
        return TensorType(dtype, tuple(int(extent) for extent in given))
    if not value.type.tensor_type.HasField("shape"):
        raise UsageError(f"{place} has no declared shape; give one: --input {value.name}=1x3x224x224 (in its place).")
    declared = _declared(value)
    shape = [symbols.get(extent, extent) if isinstance(extent, str) else extent for extent in declared]
    if any(isinstance(extent, str) for extent in shape):
        example = times(1 if isinstance(extent, str) else extent for extent in shape)
        raise UsageError(
            f"{place} has the open shape {times(declared)}, and a library is compiled for one shape; "
            f"pin it, for example: --input {value.name}={example}"
        )
    extents = tuple(int(extent) for extent in shape)
    if any(extent < 1 for extent in extents) or math.prod(extents) > _ELEMENT_LIMIT:
        raise ModelError(f"{place} declares the impossible shape {list(extents)}.")
    return TensorType(dtype, extents)


def _declared(value: onnx.ValueInfoProto) -> list[int | str]:
    """The declared extents: a number, a symbol, or '?' for one without a name."""
    dims = value.type.tensor_type.shape.dim
    return [int(dim.dim_value) if dim.HasField("dim_value") else (dim.dim_param or "?") for dim in dims]


def _check_nodes(graph: Graph) -> None:
    produced = {name for node in graph.nodes for name in node.output}
    known = set(graph.inputs) | set(graph.constants)
    for node in graph.nodes:
        if node.domain not in _STANDARD_DOMAINS:
            raise UnsupportedError(
                f"The {graph.where(node)} belongs to the operator set {quote(node.domain)}, which is not known here; "
                "export the model with standard ONNX operators only."
            )
        for name in node.input:
            if name and name not in known:
                why = (
                    "only a later node makes it: the graph has a cycle or is out of order"
                    if name in produced
                    else "nothing makes it"
                )
                raise ModelError(f"The {graph.where(node)} reads {quote(name)}, but {why}.")
        for name in node.output:
            if name and name in known:
                raise ModelError(f"The {graph.where(node)} makes {quote(name)}, which exists already.")
            known.add(name)
    for name in graph.outputs:
        if name not in known:
            raise ModelError(f"The output {quote(name)} of {graph.source} is never made; the file is damaged.")


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
