"""Quantized ONNX models: integer operators become QDQ with the same numbers; scales and int8 weights are kept."""

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx_models import floats, model_of, onnxruntime_outputs, same_as_onnxruntime
from running import run_module

from pumice.errors import ModelError, UnsupportedError
from pumice.frontend import read_model
from pumice.module import weights_of

RNG = np.random.default_rng(3)


def int8(*shape):
    return RNG.integers(-128, 128, shape).astype(np.int8)


def uint8(*shape):
    return RNG.integers(0, 256, shape).astype(np.uint8)


def scalar(value, dtype=np.float32):
    return np.array(value, dtype)


def qlinear_conv(w, w_zero, bias=True):
    n = w.shape[0]
    names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", *(["b"] if bias else [])]
    constants = {
        "xs": scalar(0.02), "xz": scalar(120, np.uint8), "w": w, "wz": w_zero,
        "ws": RNG.uniform(0.001, 0.01, n).astype(np.float32) if w_zero.ndim else scalar(0.004),
        "ys": scalar(0.05), "yz": scalar(100, np.uint8),
    }  # fmt: skip
    if bias:
        constants["b"] = RNG.integers(-5000, 5000, n).astype(np.int32)
    node = helper.make_node("QLinearConv", names, ["y"], name="conv", pads=[1, 1, 1, 1], strides=[2, 1])
    return model_of([node], {"x": ("u8", [1, 4, 9, 7])}, constants)


@pytest.mark.parametrize(
    ("w", "zero"),
    [
        (int8(8, 4, 3, 3), np.zeros(8, np.int8)),
        (int8(8, 4, 3, 3), scalar(0, np.int8)),
        (uint8(8, 4, 3, 3), np.full(8, 128, np.uint8)),
        (uint8(8, 4, 3, 3), scalar(131, np.uint8)),
    ],
    ids=["int8 per channel", "int8 per tensor", "uint8 centred", "uint8 asymmetric"],
)
def test_qlinear_conv(w, zero):
    model, x = qlinear_conv(w, zero), {"x": uint8(1, 4, 9, 7)}
    mod = read_model(model)
    got, wanted = run_module(mod, x)[0].astype(int), onnxruntime_outputs(model, x)[0].astype(int)
    # ONNX Runtime multiplies by a rounded x_scale * w_scale / y_scale: on a tie the step may differ by one.
    assert np.abs(got - wanted).max() <= 1
    assert (got != wanted).mean() < 0.01
    weights = weights_of(mod)
    assert weights["b"].dtype == np.float32
    if zero.flat[0] == 131:  # no int8 with zero point 0 stands for it
        assert weights["w"].dtype == np.float32
    else:
        shift = 128 if w.dtype == np.uint8 else 0
        np.testing.assert_array_equal(weights["w"], (w.astype(int) - shift).astype(np.int8))
        assert weights["w.scale"].shape == (8,)


def test_qlinear_matmul():
    names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"]
    constants = {
        "xs": scalar(0.02), "xz": scalar(-3, np.int8), "w": int8(16, 6), "ws": scalar(0.004), "wz": scalar(0, np.int8),
        "ys": scalar(0.05), "yz": scalar(4, np.int8),
    }  # fmt: skip
    model = model_of([helper.make_node("QLinearMatMul", names, ["y"])], {"x": ("i8", [3, 16])}, constants)
    x = {"x": int8(3, 16)}
    mod = read_model(model)
    assert np.abs(run_module(mod, x)[0].astype(int) - onnxruntime_outputs(model, x)[0]).max() <= 1
    assert weights_of(mod)["w"].dtype == np.int8
    np.testing.assert_array_equal(weights_of(mod)["w.scale"], np.full(6, 0.004, np.float32))


@pytest.mark.parametrize("op", ["ConvInteger", "MatMulInteger"])
def test_integer_product_read_as_integers(op):
    constants = {"w": int8(4, 4, 2, 2) if op == "ConvInteger" else int8(8, 5), "xz": scalar(7, np.uint8)}
    shape = [1, 4, 6, 6] if op == "ConvInteger" else [3, 8]
    model = model_of([helper.make_node(op, ["x", "w", "xz"], ["y"])], {"x": ("u8", shape)}, constants)
    same_as_onnxruntime(model, {"x": uint8(*shape)}, atol=0)


def test_integer_product_beyond_float32():
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"], name="big")
    model = model_of([node], {"x": ("u8", [1, 4096])}, {"w": int8(4096, 2)})
    with pytest.raises(UnsupportedError, match=r"MatMulInteger node 'big'.*4096"):
        read_model(model)
    cast = helper.make_node("Cast", ["y"], ["f"], to=TensorProto.FLOAT)
    model = model_of([node, cast], {"x": ("u8", [1, 4096])}, {"w": int8(4096, 2)}, outputs=("f",))
    same_as_onnxruntime(model, {"x": uint8(1, 4096)})


def qdq_linear(**changes):
    """Quantize, dequantize, and a linear layer with a quantized weight and an int32 bias."""
    constants = {
        "xs": scalar(0.03), "xz": scalar(128, np.uint8), "w": int8(6, 16), "ws": np.full(6, 0.01, np.float32),
        "wz": np.zeros(6, np.int8), "b": np.arange(6, dtype=np.int32), "bs": np.full(6, 0.0003, np.float32),
        "bz": np.zeros(6, np.int32),
    } | changes  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], name="q"),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], name="dq"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], name="dqw", axis=changes.get("axis", 0)),
        helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], name="dqb", axis=0),
        helper.make_node("Gemm", ["xd", "wd", "bd"], ["y"], transB=1),
    ]
    constants.pop("axis", None)
    return model_of(nodes, {"x": ("f", [2, 16])}, constants)


def test_qdq_keeps_int8_and_scales():
    mod = same_as_onnxruntime(qdq_linear(), {"x": floats(2, 16)})
    weights = weights_of(mod)
    assert {name: value.dtype.name for name, value in weights.items()} == {
        "w": "int8", "w.scale": "float32", "b": "float32"
    }  # fmt: skip
    text = mod["main"].script()
    assert text.count("R.quantize(") == 1
    assert text.count("R.dequantize(") == 2


def test_weight_quantized_in_the_graph_becomes_int8():
    w = floats(16, 4)
    nodes = [
        helper.make_node("QuantizeLinear", ["fc.weight", "s", "z"], ["q"], axis=1),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], axis=1),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    constants = {"fc.weight": w, "s": np.array([0.01, 0.02, 0.03, 0.5], np.float32), "z": np.zeros(4, np.int8)}
    mod = same_as_onnxruntime(model_of(nodes, {"x": ("f", [3, 16])}, constants), {"x": floats(3, 16)})
    assert weights_of(mod)["fc.weight"].dtype == np.int8
    np.testing.assert_array_equal(weights_of(mod)["fc.weight.scale"], constants["s"])


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"xs": scalar(0)}, ModelError, r"node 'q'.*positive"),
        ({"xs": scalar(-0.1)}, ModelError, "positive"),
        ({"xs": scalar(np.nan)}, ModelError, "positive"),
        ({"xs": scalar(np.inf)}, ModelError, "positive"),
        ({"xs": scalar(1e-41)}, ModelError, "positive normal"),
        ({"ws": np.ones(5, np.float32), "wz": np.zeros(5, np.int8)}, ModelError, "5 scales for the 6 channels"),
        ({"wz": np.zeros(5, np.int8)}, ModelError, "6 scales and 5 zero points"),
        ({"axis": 2}, ModelError, "dqw"),
        ({"wz": np.zeros(6, np.uint8)}, ModelError, "dqw.*zero_point"),
        ({"xz": scalar(0, np.uint16)}, (ModelError, UnsupportedError), "'q'"),
        ({"ws": np.ones((6, 2), np.float32), "wz": np.zeros((6, 2), np.int8)}, UnsupportedError, "each block"),
        ({"xs": scalar(0.1, np.float16)}, (ModelError, UnsupportedError), "'q'"),
    ],
)
def test_bad_quantization_is_refused_with_its_node(changes, kind, says):
    with pytest.raises(kind, match=says):
        read_model(qdq_linear(**changes))


def test_dynamic_quantization_is_refused_by_name():
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="dyn"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    with pytest.raises(UnsupportedError, match="DynamicQuantizeLinear node 'dyn'"):
        read_model(model_of(nodes, {"x": ("f", [4])}, {}))
