"""Small ONNX models for tests, and ONNX Runtime's numbers for them."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from running import run_module

from pumice.frontend import read_model

RNG = np.random.default_rng(7)


def model_of(nodes, inputs, constants, outputs=("y",), opset=17, name="net") -> onnx.ModelProto:
    """A model: ``inputs`` name -> (dtype, shape with symbols), ``constants`` name -> array."""
    types = {"f": TensorProto.FLOAT, "u8": TensorProto.UINT8, "i8": TensorProto.INT8, "i64": TensorProto.INT64}
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(n, types[t], shape) for n, (t, shape) in inputs.items()],
        [onnx.ValueInfoProto(name=n) for n in outputs],
        [numpy_helper.from_array(np.asarray(value), n) for n, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def floats(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def onnxruntime_outputs(model: onnx.ModelProto, feeds):
    """What ONNX Runtime makes of the model as it stands, without its own fusions."""
    ort = pytest.importorskip("onnxruntime")
    typed = onnx.shape_inference.infer_shapes(model)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(typed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def same_as_onnxruntime(model, feeds, atol=1e-5):
    mod = read_model(model, {name: value.shape for name, value in feeds.items()})
    for got, wanted in zip(run_module(mod, feeds), onnxruntime_outputs(model, feeds), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=atol)
    return mod
