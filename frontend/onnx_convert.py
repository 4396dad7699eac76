"""From a checked, folded Graph to a Relax module: TVM's importer, with converters of our own where it errs."""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import helper
from tvm import relax, te
from tvm.ir import IRModule
from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter

from pumice.errors import UnsupportedError
from pumice.frontend.onnx_graph import STRUCTURAL_OPERANDS, Graph, quote
from pumice.module import with_output_names, with_source, with_weights

_WEIGHT_DTYPES = {"float32", "int8", "uint8"}
Converter = Callable[[relax.BlockBuilder, list[relax.Expr], dict[str, Any]], relax.Expr]


def convert_graph(graph: Graph) -> IRModule:
    """The graph as a module in Pumice's form: weights as named parameters, everything else literal."""
    weights = [name for name in graph.constants if _is_weight(graph, name)]
    importer = _Importer(graph, weights)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        mod = importer.from_onnx(_to_proto(graph), graph.opset)
    mod = _drop_importer_attributes(mod, len(graph.inputs))
    mod = with_weights(mod, {name: graph.constants[name] for name in weights})
    return with_source(with_output_names(mod, graph.outputs), graph.source)


def _is_weight(graph: Graph, name: str) -> bool:
    """Whether a constant becomes a parameter: a float or 8-bit tensor that something computes with."""
    value = graph.constants[name]
    if value.ndim == 0 or value.dtype.name not in _WEIGHT_DTYPES or (value.size == 1 and name in graph.derived):
        return False
    operands = [(node.op_type, position) for node, position in graph.consumers().get(name, [])]
    return not operands or any(position not in STRUCTURAL_OPERANDS.get(op, ()) for op, position in operands)


class _Importer(ONNXGraphImporter):  # type: ignore[misc]
    """TVM's importer, reading constants from the Graph and preferring the converters of this file."""

    def __init__(self, graph: Graph, weights: list[str]) -> None:
        super().__init__({}, {}, keep_params_in_input=True, sanitize=False)
        self._graph = graph
        self._weights = set(weights)

    def _parse_graph_initializers(self, graph: onnx.GraphProto) -> None:
        for name, value in self._graph.constants.items():
            if name in self._weights:
                # The key is what the importer looks constants up by: none, so that no weight turns literal.
                var = relax.Var(name, relax.TensorType(value.shape, value.dtype.name))
                self._nodes[name] = var
                self._params[name] = (var, None)
            else:
                self._nodes[name] = relax.const(value, value.dtype.name)

    def _convert_operator(self, op_name: str, inputs: Any, attrs: dict[str, Any], opset: int) -> relax.Expr:
        own = CONVERTERS.get(op_name)
        try:
            converted = own(self.bb, list(inputs), attrs) if own else None
            if converted is not None:
                return self.bb.normalize(converted)
            return super()._convert_operator(op_name, inputs, attrs, opset)
        except Exception as error:
            name = attrs["tvm_custom"]["name"]
            reason = str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__
            raise UnsupportedError(
                f"The {op_name} node {quote(name)} of {self._graph.source} cannot be imported: {reason}"
            ) from error


def _to_proto(graph: Graph) -> onnx.GraphProto:
    for node in graph.nodes:
        node.name = node.name or next(name for name in node.output if name)
    return helper.make_graph(
        graph.nodes,
        "main",
        [helper.make_value_info(name, type_.to_proto()) for name, type_ in graph.inputs.items()],
        [helper.make_value_info(name, graph.types[name].to_proto()) for name in graph.outputs],
    )


def _drop_importer_attributes(mod: IRModule, inputs: int) -> IRModule:
    """Without the copy of the weights that the importer attaches to ``main``."""
    main = mod["main"].without_attr("params") if "params" in mod["main"].attrs else mod["main"]
    mod["main"] = main.with_attr("num_input", inputs)
    return mod


def _literal(expr: relax.Expr | None) -> np.ndarray | None:
    return expr.value.numpy() if isinstance(expr, tvm.ir.GenericConst) else None


def _clip(bb: relax.BlockBuilder, inputs: list[relax.Expr], attrs: dict[str, Any]) -> relax.Expr | None:
    """``R.clip`` instead of loops, so that passes see it; a NaN bound is no bound."""
    bounds = [float(attrs.get("min", -np.inf)), float(attrs.get("max", np.inf))]
    for i, given in enumerate(inputs[1:3]):
        if given is not None:
            value = _literal(given)
            if value is None:
                return None
            bounds[i] = float(value.item())
    low, high = (-np.inf if np.isnan(bounds[0]) else bounds[0]), (np.inf if np.isnan(bounds[1]) else bounds[1])
    if "float" not in str(inputs[0].ty.dtype):
        return None
    # ONNX: with min above max every element becomes max.
    return relax.op.clip(inputs[0], min(low, high), high)


def _gather(bb: relax.BlockBuilder, inputs: list[relax.Expr], attrs: dict[str, Any]) -> relax.Expr:
    """Literal indices made non-negative here; computed ones wrapped once and clipped, never out of bounds."""
    data, indices = inputs
    axis = attrs.get("axis", 0) % len(data.ty.shape)
    extent = int(data.ty.shape[axis])
    known = _literal(indices)
    if known is not None:
        if known.size and (known.min() < -extent or known.max() >= extent):
            raise ValueError(f"an index is outside the extent {extent} of axis {axis}")
        indices = relax.const(np.where(known < 0, known + extent, known).astype(known.dtype))
    else:
        dtype = str(indices.ty.dtype)
        wrapped = relax.op.add(indices, relax.const(extent, dtype))
        indices = bb.normalize(relax.op.where(relax.op.less(indices, relax.const(0, dtype)), wrapped, indices))
    return relax.op.take(data, indices, axis, mode="clip")


def _pow(bb: relax.BlockBuilder, inputs: list[relax.Expr], attrs: dict[str, Any]) -> relax.Expr | None:
    """A literal exponent takes the base's element type (ONNX lets them differ)."""
    exponent = _literal(inputs[1])
    if exponent is None:
        return None
    dtype = str(inputs[0].ty.dtype)
    return relax.op.power(inputs[0], relax.const(exponent.astype(dtype), dtype))


def _pad(bb: relax.BlockBuilder, inputs: list[relax.Expr], attrs: dict[str, Any]) -> relax.Expr | None:
    """``R.nn.pad``, so that passes see it."""
    pads = _literal(inputs[1]) if len(inputs) > 1 else None
    if pads is None or (len(inputs) > 3 and inputs[3] is not None):
        return None
    value = np.zeros((), np.float32) if len(inputs) < 3 or inputs[2] is None else _literal(inputs[2])
    if value is None:
        raise ValueError("its padding value is computed while running")
    before, after = np.split(pads, 2)
    mode = _PAD_MODES[attrs.get("mode", b"constant").decode()]
    return relax.op.nn.pad(inputs[0], np.stack([before, after], 1).ravel().tolist(), mode, value.item())


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def _tile(bb: relax.BlockBuilder, inputs: list[relax.Expr], attrs: dict[str, Any]) -> relax.Expr | None:
    """``R.tile``, so that passes see it."""
    repeats = _literal(inputs[1])
    return None if repeats is None else relax.op.tile(inputs[0], repeats.ravel().tolist())


def _extreme(operator: str, combine: Callable[[Any, Any], Any], identity: float) -> Converter:
    """ReduceMax and ReduceMin of float32 with the infinite identity: TVM's own is finite, wrong on rows of -inf.

    The function that computes it says what it is in the attributes ``pumice.reduce``, ``axes`` and ``keepdims``.
    """

    def convert(bb: relax.BlockBuilder, inputs: list[relax.Expr], attrs: dict[str, Any]) -> relax.Expr | None:
        if str(inputs[0].ty.dtype) != "float32":
            return None
        rank = len(inputs[0].ty.shape)
        given = inputs[1] if len(inputs) > 1 else None
        known = np.array(attrs.get("axes", []), int) if given is None else _literal(given)
        if known is None:
            raise ValueError("its axes are computed while running")
        axes = known.ravel().tolist()
        if not axes and attrs.get("noop_with_empty_axes", 0):
            return inputs[0]
        axes = sorted(axis % rank for axis in axes) or list(range(rank))
        kept = bool(attrs.get("keepdims", 1))
        meaning = {"pumice.reduce": operator, "axes": axes, "keepdims": kept}
        return bb.emit_te(
            lambda x: _reduce(x, axes, kept, combine, identity),
            inputs[0],
            primfunc_name_hint=f"reduce_{operator}",
            primfunc_attrs=meaning,
        )

    return convert


def _reduce(
    x: te.Tensor, axes: list[int], kept: bool, combine: Callable[[Any, Any], Any], identity: float
) -> te.Tensor:
    reducer = te.comm_reducer(combine, lambda dtype: tvm.tirx.const(identity, dtype), name="extreme")
    loops = {axis: te.reduce_axis((0, x.shape[axis]), f"k{axis}") for axis in axes}
    shape = [1 if axis in loops else extent for axis, extent in enumerate(x.shape) if kept or axis not in loops]

    def element(*indices: Any) -> Any:
        places = iter(indices)
        read = []
        for axis in range(len(x.shape)):
            place = next(places) if kept or axis not in loops else None
            read.append(loops.get(axis, place))
        return reducer(x(*read), axis=list(loops.values()))

    return te.compute(shape, element, name="reduce_extreme")


def _pairwise(binary: Callable[[relax.Expr, relax.Expr], relax.Expr]) -> Converter:
    """A variadic operator as a chain of binary ones, in place of broadcast, stack and reduce."""

    def convert(bb: relax.BlockBuilder, inputs: list[relax.Expr], attrs: dict[str, Any]) -> relax.Expr:
        return functools.reduce(lambda a, b: bb.normalize(binary(a, b)), inputs)

    return convert


CONVERTERS: dict[str, Converter] = {
    "Clip": _clip,
    "Gather": _gather,
    "Max": _pairwise(relax.op.maximum),
    "Min": _pairwise(relax.op.minimum),
    "Pad": _pad,
    "Pow": _pow,
    "ReduceMax": _extreme("max", lambda a, b: tvm.tirx.Max(a, b), -np.inf),
    "ReduceMin": _extreme("min", lambda a, b: tvm.tirx.Min(a, b), np.inf),
    "Sum": _pairwise(relax.op.add),
    "Tile": _tile,
}
