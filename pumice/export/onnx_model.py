"""Write a module, pruned and quantized but not yet lowered, as a standard ONNX model that other runtimes run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
from onnx import helper
from tvm import relax
from tvm.ir import IRModule

from pumice.errors import PumiceError, UnsupportedError
from pumice.export.onnx_graph import IR_VERSION, OPSET, OnnxGraph, Value
from pumice.export.onnx_operators import OPERATORS
from pumice.files import move_into_place
from pumice.module import layers_of, output_names_of
from pumice.passes.dataflow import operator_name
from pumice.passes.layers import find_layers

_SIZE_LIMIT = 2**31 - 2**24  # bytes of weights: protobuf's limit, less room for the graph


def export_onnx(mod: IRModule, options: Mapping[str, object] | None = None) -> onnx.ModelProto:
    """``mod`` (in the form of ``pumice.module``) as ONNX, version 21 of the operators.

    Inputs, outputs and weights keep their names; zeros stay zeros. ``quantize`` and ``dequantize`` become
    QuantizeLinear and DequantizeLinear: weights are int8 initializers with a scale for each output channel. The
    records of the layers go into the metadata as ``pumice.layers``, and ``options`` as ``pumice.options``, both JSON.

    Raises UnsupportedError for an operator that ONNX has no form for, and for a model of 2 GB or more.
    """
    graph = OnnxGraph(mod)
    labels = {layer.var: layer.name for layer in find_layers(mod)}
    for var, value in graph.flow.bindings:
        if var not in graph.values:  # a bias is written with its convolution
            graph.begin(var, value, labels.get(var, str(var.name)))
            graph.values[var] = _written(graph, var, value)
    proto = graph.finish(_outputs(graph, mod))
    if graph.size > _SIZE_LIMIT:
        raise UnsupportedError(
            f"{graph.source}: {graph.size:,} bytes of weights do not fit an ONNX file, which holds less than 2 GB; "
            "compile without --emit-onnx"
        )
    model = helper.make_model(
        proto,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="pumice",
        producer_version=version("pumice"),
    )
    layers = [layer.to_json() for layer in layers_of(mod).values()]
    helper.set_model_props(
        model, {"pumice.layers": json.dumps(layers), "pumice.options": json.dumps(dict(options or {}), default=str)}
    )
    _check(model, graph.source)
    return model


def write_onnx(mod: IRModule, path: str | Path, options: Mapping[str, object] | None = None) -> None:
    """``export_onnx`` into a file, whole or not at all. Raises what that does, and UsageError for the path."""
    model = export_onnx(mod, options)
    with TemporaryDirectory(prefix="pumice-") as folder:
        whole = Path(folder, "model.onnx")
        whole.write_bytes(model.SerializeToString())
        move_into_place(whole, Path(path))


def _written(graph: OnnxGraph, var: relax.Var, value: relax.Expr) -> Value:
    """The name of what a binding computes, after the nodes for it are in the graph."""
    if isinstance(value, relax.Tuple):
        return tuple(graph.read(field) for field in value.fields)
    if isinstance(value, relax.TupleGetItem):
        return graph.values[value.tuple_value][value.index]
    if isinstance(value, relax.Call):
        rule = OPERATORS.get(operator_name(value))
        if rule is None:
            raise graph.refusal("has no form in ONNX that Pumice knows")
        return rule(graph, var, value)
    return graph.read(value)


def _outputs(graph: OnnxGraph, mod: IRModule) -> list[tuple[str, relax.Expr]]:
    result = mod["main"].body.body
    if isinstance(result, relax.Var) and isinstance(graph.flow.value.get(result), relax.Tuple):
        result = graph.flow.value[result]
    results = list(result.fields) if isinstance(result, relax.Tuple) else [result]
    return list(zip(output_names_of(mod), results, strict=True))


def _check(model: onnx.ModelProto, source: str) -> None:
    """The types that ONNX infers are those that the module declares, for every value of it."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = next(line for line in str(error).splitlines() if line.strip())
        raise PumiceError(
            f"{source}: what was written as ONNX is not valid: {reason}; this is a defect in Pumice, please report it"
        ) from error
