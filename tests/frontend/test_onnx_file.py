"""Damaged and hostile ONNX files: one sentence that names the file, never a traceback, never a foreign path."""

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pumice.errors import ModelError, PumiceError, UnsupportedError, UsageError
from pumice.frontend import read_model
from pumice.module import weights_of


def linear(opset: int = 17, weight: TensorProto | None = None, **parts) -> onnx.ModelProto:
    """``y = x @ w`` for x [2, 4], w [4, 3], with parts of the graph replaced."""
    weight = weight or numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    graph = helper.make_graph(
        parts.get("nodes", [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]),
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, parts.get("shape", [2, 4]))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in parts.get("outputs", ["y"])],
        parts.get("initializers", [weight]),
        sparse_initializer=parts.get("sparse", []),
    )
    domains = [helper.make_opsetid("", opset), *[helper.make_opsetid(d, 1) for d in parts.get("domains", [])]]
    return helper.make_model(graph, opset_imports=domains)


def saved(tmp_path, model: onnx.ModelProto):
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def external(location: str = "net.bin", **fields) -> onnx.ModelProto:
    """The linear model with its 48 bytes of weight in another file."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 3], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **fields}.items():
        weight.external_data.add(key=key, value=str(value))
    return linear(weight=weight)


def misdeclared(dims, **fields) -> onnx.ModelProto:
    return linear(weight=TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, **fields))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not an ONNX"),
        (np.random.default_rng(0).bytes(5000), "not an ONNX"),
        (linear().SerializeToString()[:-40], "truncated"),
        (b"\x08\x07", "not an ONNX"),
    ],
    ids=["empty", "html", "random", "truncated", "no graph"],
)
def test_file_that_is_no_model(tmp_path, content, says):
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=says) as error:
        read_model(path)
    assert "net.onnx" in str(error.value)
    assert "\n" not in str(error.value)


def test_folder_and_missing_file(tmp_path):
    with pytest.raises(ModelError, match="folder"):
        read_model(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        read_model(tmp_path / "gone.onnx")


def test_file_larger_than_protobuf_reads(tmp_path):
    path = tmp_path / "net.onnx"
    with path.open("wb") as stream:
        stream.truncate(2**31)  # sparse: takes no disk
    with pytest.raises(ModelError, match="external data"):
        read_model(path)


BAD_GRAPHS = {
    "opset 5": (linear(opset=5), UnsupportedError, "version 5 "),
    "opset 99": (linear(opset=99), UnsupportedError, "version 99 "),
    "unknown operator": (
        linear(nodes=[helper.make_node("Magic", ["x"], ["y"], name="m")]),
        UnsupportedError,
        "Magic node 'm'",
    ),
    "unknown domain": (
        linear(nodes=[helper.make_node("Gelu", ["x"], ["y"], domain="com.corp")], domains=["com.corp"]),
        UnsupportedError,
        "com.corp",
    ),
    "product overflow": (misdeclared([2**32, 2**32], raw_data=b"1234"), ModelError, "impossible shape"),
    "negative extent": (misdeclared([-4, -3], raw_data=bytes(48)), ModelError, "impossible shape"),
    "300 axes": (misdeclared([1] * 300, raw_data=bytes(4)), ModelError, "impossible shape"),
    "short raw data": (misdeclared([4, 3], raw_data=bytes(44)), ModelError, "44 bytes"),
    "short typed data": (misdeclared([4, 3], float_data=[1.0]), ModelError, "1 values"),
    "strings": (
        linear(weight=TensorProto(name="w", data_type=TensorProto.STRING, dims=[1])),
        UnsupportedError,
        "string",
    ),
    "int4": (linear(weight=TensorProto(name="w", data_type=TensorProto.INT4, dims=[4])), UnsupportedError, "int4"),
    "float16": (
        linear(weight=numpy_helper.from_array(np.ones((4, 3), np.float16), "w")),
        PumiceError,
        "product",
    ),
    "two initializers of one name": (
        linear(initializers=[numpy_helper.from_array(np.ones((4, 3), np.float32), "w")] * 2),
        ModelError,
        "two initializers named 'w'",
    ),
    "cycle": (
        linear(
            nodes=[helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Add", ["a", "a"], ["b"])],
            outputs=["b"],
        ),
        ModelError,
        "cycle",
    ),
    "missing operand": (linear(nodes=[helper.make_node("Add", ["x", "gone"], ["y"])]), ModelError, "nothing makes it"),
    "missing output": (linear(outputs=["z"]), ModelError, "'z'"),
    "defined twice": (
        linear(nodes=[helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["y"])]),
        ModelError,
        "exists already",
    ),
    "shapes that do not fit": (linear(shape=[2, 5]), ModelError, "product"),
    "absurd constant": (
        linear(nodes=[helper.make_node("ConstantOfShape", ["s"], ["y"])],
               initializers=[numpy_helper.from_array(np.array([2**20, 2**20, 2**20]), "s")]),
        ModelError,
        "impossible shape",
    ),
    "terminal escapes in a name": (
        linear(nodes=[helper.make_node("Magic", ["x"], ["y"], name="\x1b[31mred" + "n" * 10_000)]),
        UnsupportedError,
        r"'\\x1b\[31mred",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_GRAPHS)
def test_unsound_graph(tmp_path, case):
    model, kind, says = BAD_GRAPHS[case]
    with pytest.raises(kind, match=says) as error:
        read_model(saved(tmp_path, model))
    assert len(str(error.value)) < 600
    assert "\x1b" not in str(error.value)


def test_external_data_inside_the_folder(tmp_path):
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    (tmp_path / "net.bin").write_bytes(b"skip" + weight.tobytes())
    mod = read_model(saved(tmp_path, external(offset=4, length=48, **{f"unknown{i}": i for i in range(10_000)})))
    np.testing.assert_array_equal(weights_of(mod)["w"], weight)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"offset": -4}, "count of bytes"),
        ({"offset": "ten"}, "count of bytes"),
        ({"offset": 10**30}, "count of bytes"),
        ({"offset": 10**15}, "truncated"),
        ({"length": 10**15}, "declares"),
        ({"length": 40}, "declares"),
        ({"offset": 8}, "truncated"),
        ({"location": "gone.bin"}, "missing"),
        ({"location": ""}, "not a plain path"),
    ],
)
def test_external_data_that_does_not_fit(tmp_path, fields, says):
    (tmp_path / "net.bin").write_bytes(bytes(48))
    with pytest.raises(ModelError, match=says):
        read_model(saved(tmp_path, external(**fields)))


@pytest.mark.parametrize("how", ["parent", "absolute", "symlink", "folder symlink", "hardlink"])
def test_external_data_outside_of_the_folder(tmp_path, how):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(48))
    folder = tmp_path / "model"
    folder.mkdir()
    location = {"parent": "../secret.bin", "absolute": str(secret), "folder symlink": "up/secret.bin"}.get(how, "w.bin")
    if how == "symlink":
        (folder / "w.bin").symlink_to(secret)
    elif how == "folder symlink":
        (folder / "up").symlink_to(tmp_path)
    elif how == "hardlink":
        os.link(secret, folder / "w.bin")
    with pytest.raises(ModelError, match=r"inside the model's folder|hard link"):
        read_model(saved(folder, external(location)))


def test_external_data_of_a_model_in_memory():
    with pytest.raises(ModelError, match="no folder"):
        read_model(external())


@pytest.mark.parametrize("flat", [True, False])
def test_sparse_initializer_unsorted(tmp_path, flat):
    values = numpy_helper.from_array(np.array([5, 7, 9], np.float32), "w")
    indices = np.array([11, 0, 4]) if flat else np.array([[3, 2], [0, 0], [1, 1]])
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(indices, "i"), [4, 3])
    dense = np.zeros((4, 3), np.float32)
    dense.flat[[11, 0, 4]] = [5, 7, 9]
    mod = read_model(saved(tmp_path, linear(initializers=[], sparse=[sparse])))
    np.testing.assert_array_equal(weights_of(mod)["w"], dense)


@pytest.mark.parametrize(("indices", "says"), [([0, 12], "outside"), ([-1, 2], "outside"), ([3, 3], "two values")])
def test_sparse_initializer_with_bad_indices(tmp_path, indices, says):
    values = numpy_helper.from_array(np.array([5, 7], np.float32), "w")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array(indices), "i"), [4, 3])
    with pytest.raises(ModelError, match=says):
        read_model(saved(tmp_path, linear(initializers=[], sparse=[sparse])))


def test_source_of_another_kind(tmp_path):
    with pytest.raises(UsageError, match="int is not a model"):
        read_model(3)
