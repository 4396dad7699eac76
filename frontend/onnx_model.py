"""Read an ONNX model into Pumice's module form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from tvm.ir import IRModule

from pumice.frontend.onnx_check import build_graph
from pumice.frontend.onnx_convert import convert_graph
from pumice.frontend.onnx_file import load_model
from pumice.frontend.onnx_fold import fold_constants
from pumice.frontend.onnx_integer import rewrite_integer_operators
from pumice.frontend.onnx_names import name_weights
from pumice.frontend.onnx_operators import check_known, check_operators
from pumice.frontend.onnx_qdq import normalize_quantization
from pumice.frontend.onnx_rewrite import rewrite_forms


def read_onnx(source: str | Path | onnx.ModelProto, inputs: Mapping[str, Sequence[int]] | None = None) -> IRModule:
    """An ONNX file, or a loaded model, as a module whose weights keep their names.

    ``inputs`` pins the shapes of inputs that the model leaves open: name -> extents. Standard operators of
    version 9 and later; external data only from the model's own folder. Raises ModelError for a file that is
    damaged or contradicts itself, UnsupportedError for what cannot be compiled right (naming operator, node
    and file), UsageError when ``inputs`` does not fit the model.
    """
    model, name, folder = load_model(source)
    graph = build_graph(model, name, folder, inputs)
    check_known(graph)
    graph = fold_constants(graph)
    graph = rewrite_integer_operators(rewrite_forms(graph))
    graph = normalize_quantization(name_weights(graph))
    check_operators(graph)
    return convert_graph(graph)
