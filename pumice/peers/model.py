"""The ONNX model that every engine of a comparison gets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pumice.errors import ModelError


def read_pinned(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """An ONNX model with its inputs' open dimensions fixed, its external data inside, so that all engines know all.

    Raises ModelError for a file that is no ONNX model or has an input that is not in ``shapes``.
    """
    from pumice.frontend.onnx_file import load_model

    model = _with_weights_inside(*load_model(path))
    given = {tensor.name for tensor in model.graph.initializer}
    for entry in model.graph.input:
        if entry.name in given:
            continue
        if entry.name not in shapes:
            raise ModelError(f"{path}: has an input '{entry.name}' that the compiled library has not")
        for dimension, size in zip(entry.type.tensor_type.shape.dim, shapes[entry.name], strict=False):
            dimension.dim_value = size
    del model.graph.value_info[:]  # what it says of shapes may contradict the fixed ones
    return bytes(model.SerializeToString())


def is_quantized(model: bytes) -> bool:
    """Whether an ONNX model already carries integer layers, which an engine then runs as they are."""
    import onnx

    quantized = {"QuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"}
    return any(node.op_type in quantized for node in onnx.load_from_string(model).graph.node)


def _with_weights_inside(model: Any, source: str, folder: Path | None) -> Any:
    from onnx import external_data_helper, numpy_helper

    from pumice.frontend.onnx_file import read_tensor

    for tensor in model.graph.initializer:
        if external_data_helper.uses_external_data(tensor):
            tensor.CopyFrom(numpy_helper.from_array(read_tensor(tensor, source, folder), tensor.name))
    return model
