"""An ONNX model in the module form: names, shapes, constants, quantization; numbers against ONNX Runtime."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx_models import floats, model_of, same_as_onnxruntime

from pumice.errors import UsageError
from pumice.frontend import read_model
from pumice.module import inputs_of, output_names_of, source_of, weight_vars_of, weights_of


def test_form_of_the_module(tmp_path):
    awkward = ["layer/0 weight.é%s", "onnx/scale", "in put:0"]
    model = model_of(
        [
            helper.make_node("Conv", [awkward[2], awkward[0], "0.bias"], ["h"]),
            helper.make_node("Mul", ["h", awkward[1]], ["y"]),
        ],
        {awkward[2]: ("f", [1, 2, 5, 5])},
        {awkward[0]: floats(3, 2, 3, 3), "0.bias": floats(3), awkward[1]: floats(3, 1, 1), "unread": floats(2)},
    )  # fmt: skip
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    mod = read_model(path)
    assert [var.name for var in inputs_of(mod)] == [awkward[2]]
    assert sorted(var.name for var in weight_vars_of(mod)) == sorted([awkward[0], "0.bias", awkward[1]])
    assert sorted(weights_of(mod)) == sorted([awkward[0], "0.bias", awkward[1]])
    assert int(mod["main"].attrs["num_input"]) == 1
    assert "params" not in mod["main"].attrs
    assert output_names_of(mod) == ["y"]
    assert source_of(mod) == "net.onnx"
    same_as_onnxruntime(model, {awkward[2]: floats(1, 2, 5, 5)})


def test_weights_in_constant_nodes():
    weight = numpy_helper.from_array(floats(4, 3), "")
    nodes = [
        helper.make_node("Constant", [], ["fc.weight"], value=weight),
        helper.make_node("MatMul", ["x", "fc.weight"], ["y"]),
    ]
    mod = same_as_onnxruntime(model_of(nodes, {"x": ("f", [2, 4])}, {}), {"x": floats(2, 4)})
    assert list(weights_of(mod)) == ["fc.weight"]


def test_mask_and_weight_stay_two_parameters():
    nodes = [helper.make_node("Mul", ["w", "mask"], ["m"]), helper.make_node("MatMul", ["x", "m"], ["y"])]
    constants = {"w": floats(4, 3), "mask": np.eye(4, 3, dtype=np.float32)}
    mod = same_as_onnxruntime(model_of(nodes, {"x": ("f", [2, 4])}, constants), {"x": floats(2, 4)})
    assert set(weights_of(mod)) == {"w", "mask"}


def test_tied_weights_are_one_parameter():
    nodes = [
        helper.make_node("Identity", ["w"], ["w2"]),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "w2"], ["y"]),
    ]
    mod = same_as_onnxruntime(model_of(nodes, {"x": ("f", [2, 4])}, {"w": floats(4, 4)}), {"x": floats(2, 4)})
    assert list(weights_of(mod)) == ["w"]


@pytest.mark.parametrize("bias", ["fc.bias", "onnx::Add_3"])
def test_anonymous_weight_is_named_after_its_layer(bias):
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["h"], name="/encoder/encoder.0/fc/MatMul"),
        helper.make_node("Add", ["h", bias], ["y"], name="/encoder/encoder.0/fc/Add"),
    ]
    model = model_of(nodes, {"x": ("f", [2, 4])}, {"onnx::MatMul_7": floats(4, 3), bias: floats(3)})
    path = "fc" if bias == "fc.bias" else "encoder.0.fc"
    assert set(weights_of(read_model(model))) == {f"{path}.weight", f"{path}.bias"}


def flattening(batch, height) -> onnx.ModelProto:
    """``Reshape(x, [Shape(x)[0], -1])`` as exporters write it."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "axes"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["to"], axis=0),
        helper.make_node("Reshape", ["x", "to"], ["f"]),
        helper.make_node("Add", ["f", "z"], ["y"]),
    ]
    constants = {"zero": np.array(0), "axes": np.array([0]), "rest": np.array([-1])}
    return model_of(nodes, {"x": ("f", [batch, 3, height]), "z": ("f", [batch, 1])}, constants)


def test_open_dimensions_are_pinned():
    model = flattening("batch", "height")
    mod = read_model(model, {"x": (2, 3, 4)})  # 'batch' of z is the same symbol
    assert [tuple(int(d) for d in var.ty.shape) for var in inputs_of(mod)] == [(2, 3, 4), (2, 1)]
    assert "shape_of" not in mod.script()
    same_as_onnxruntime(model, {"x": floats(2, 3, 4), "z": floats(2, 1)})


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (None, r"input 'x' of net has the open shape batchx3xheight.*--input x=1x3x1"),
        ({"x": (2, 3, 4), "image": (1,)}, r"no input 'image'; its inputs are: 'x', 'z'"),
        ({"x": (2, 5, 4)}, r"2x5x4 given for input 'x'.*does not fit the declared batchx3xheight"),
        ({"x": (2, 3)}, "does not fit"),
        ({"x": (2, 3, 0)}, "below 1"),
        ({"x": (2, 3, 4), "z": (1, 1)}, "'batch' 1, elsewhere it is 2"),
    ],
)
def test_open_dimensions_given_wrong(inputs, says):
    with pytest.raises(UsageError, match=says):
        read_model(flattening("batch", "height"), inputs)


def test_scalar_input_and_several_outputs():
    nodes = [helper.make_node("Mul", ["x", "k"], ["y"]), helper.make_node("Relu", ["y"], ["r"])]
    model = model_of(nodes, {"x": ("f", [3]), "k": ("f", [])}, {}, outputs=("r", "y"))
    mod = same_as_onnxruntime(model, {"x": floats(3), "k": np.array(2, np.float32)})
    assert output_names_of(mod) == ["r", "y"]


# Forms that TVM's importer reads wrong by itself, against ONNX Runtime.
FORMS = {
    "conv same_upper stride 2": ("Conv", {"w": floats(4, 2, 3, 3)}, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, 17),
    "conv same_lower even kernel": ("Conv", {"w": floats(4, 2, 2, 4)}, {"auto_pad": "SAME_LOWER"}, 17),
    "conv one-sided pads": ("Conv", {"w": floats(4, 1, 3, 3)}, {"group": 2, "pads": [0, 1, 2, 0]}, 17),
    "max pool same_lower stride 2": (
        "MaxPool", {}, {"kernel_shape": [3, 3], "auto_pad": "SAME_LOWER", "strides": [2, 2]}, 17),
    "average pool same_upper": (
        "AveragePool", {}, {"kernel_shape": [3, 2], "auto_pad": "SAME_UPPER", "strides": [2, 3]}, 17),
    "average pool ceil": ("AveragePool", {}, {"kernel_shape": [2, 3], "ceil_mode": 1, "strides": [2, 2]}, 19),
    "transposed output_shape": (
        "ConvTranspose", {"w": floats(2, 3, 3, 3)}, {"output_shape": [18, 17], "strides": [2, 2]}, 17),
    "transposed same_upper": (
        "ConvTranspose", {"w": floats(2, 3, 3, 3)}, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, 17),
    "transposed groups": ("ConvTranspose", {"w": floats(2, 3, 3, 3)}, {"group": 2, "pads": [1, 0, 0, 1]}, 17),
    "transposed dilations": ("ConvTranspose", {"w": floats(2, 3, 3, 2)}, {"dilations": [2, 3], "strides": [2, 1]}, 17),
    "slice by attributes": ("Slice", {}, {"starts": [1, -3], "ends": [100, -1], "axes": [2, 3]}, 9),
    "clip by attributes": ("Clip", {}, {"min": -0.5, "max": 0.25}, 9),
    "reflect pad by attributes": ("Pad", {}, {"mode": "reflect", "pads": [0, 0, 1, 2, 0, 0, 2, 1]}, 9),
    "constant pad by attributes": ("Pad", {}, {"value": 1.5, "pads": [0, 0, 1, 2, 0, 0, 2, 1]}, 9),
    "constant pad that crops": ("Pad", {"p": np.array([0, 0, -1, 2, 0, 0, 2, -1])}, {}, 13),
    "upsample": ("Upsample", {"s": np.array([1, 1, 2, 3], np.float32)}, {"mode": "nearest"}, 9),
    "upsample linear": ("Upsample", {"s": np.array([1, 1, 2, 3], np.float32)}, {"mode": "linear"}, 9),
    "first resize": ("Resize", {"s": np.array([1, 1, 0.5, 0.5], np.float32)}, {"mode": "nearest"}, 10),
    "resize half_pixel": (
        "Resize", {"": None, "r": np.zeros(0, np.float32), "n": np.array([1, 2, 18, 12])}, {"mode": "linear"}, 13),
    "softmax over trailing axes": ("Softmax", {}, {"axis": 1}, 9),
    "negative gather": ("Gather", {"i": np.array([-1, 0, 3])}, {"axis": 3}, 13),
    "integer exponent": ("Pow", {"e": np.array(3)}, {}, 13),
    "reduce by attributes": ("ReduceMean", {}, {"axes": [1, -1], "keepdims": 0}, 11),
    "prelu by channel": ("PRelu", {"s": floats(2, 1, 1)}, {}, 9),
}  # fmt: skip


@pytest.mark.parametrize("case", FORMS)
def test_form_against_onnxruntime(case):
    op, constants, attributes, opset = FORMS[case]
    names = ["x", *constants]
    if op == "Resize" and opset > 10:
        names = ["x", "r", "r", "n"]
    named = {name: value for name, value in constants.items() if name}
    x = floats(1, 2, 9, 8) if case != "first resize" else floats(1, 2, 8, 8)
    model = model_of(
        [helper.make_node(op, names, ["y"], **attributes)], {"x": ("f", list(x.shape))}, named, opset=opset
    )
    same_as_onnxruntime(model, {"x": x})


def test_rows_of_minus_infinity():
    nodes = [helper.make_node("ReduceMax", ["x"], ["y"], axes=[1], keepdims=0)]
    x = np.array([[-np.inf, -np.inf], [1, -np.inf]], np.float32)
    same_as_onnxruntime(model_of(nodes, {"x": ("f", [2, 2])}, {}), {"x": x})
