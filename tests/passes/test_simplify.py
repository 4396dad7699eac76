"""SimplifyModel on what the frontends give it, and the walk that all its passes share."""

import numpy as np
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from scripted import assert_same_numbers, bindings, scripted
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from pumice.errors import UnsupportedError
from pumice.frontend.onnx_model import read_onnx
from pumice.module import weights_of
from pumice.passes import SimplifyModel
from pumice.passes.layers import find_layers
from pumice.passes.rewriting import Rewriter, rewrite

RANDOM = np.random.default_rng(5)


def onnx_model(nodes, inputs, output, **initializers):
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in initializers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def f32(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def simplified(mod):
    """Simplified, with the promises that hold for every model: the same numbers, unique names, nothing left to do."""
    after = SimplifyModel()(mod)
    assert_same_numbers(mod, after, rtol=1e-4)
    assert len(after["main"].body.blocks) == 1
    names = [b.var.name for b in after["main"].body.blocks[0].bindings] + [p.name for p in after["main"].params]
    assert len(set(names)) == len(names)
    again = SimplifyModel()(after)
    tvm.ir.assert_structural_equal(again["main"], after["main"], map_free_vars=True)
    for name, value in weights_of(after).items():
        np.testing.assert_array_equal(weights_of(again)[name], value)
    return after


def test_a_convolutional_onnx_model():
    node = helper.make_node
    model = onnx_model(
        [
            node("Mul", ["conv.weight_orig", "conv.weight_mask"], ["w"]),
            node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], name="conv"),
            node("BatchNormalization", ["c", "bn.weight", "bn.bias", "bn.mean", "bn.var"], ["b"]),
            node("Clip", ["b", "zero", "six"], ["r"]),
            node("Conv", ["r", "dw.weight", "dw.bias"], ["d"], group=8, pads=[0, 0, 1, 1], name="dw"),
            node("Relu", ["d"], ["e"]),
            node("GlobalAveragePool", ["e"], ["g"]),
            node("Flatten", ["g"], ["f"]),
            node("Gemm", ["f", "fc.weight", "fc.bias"], ["y"], transB=1, alpha=0.5, beta=2.0, name="fc"),
        ],
        {"x": [1, 3, 6, 6]},
        "y",
        **{"conv.weight_orig": f32(8, 3, 3, 3), "conv.weight_mask": (f32(8, 3, 3, 3) > 0).astype(np.float32)},
        **{f"bn.{n}": np.abs(f32(8)) for n in ("weight", "bias", "mean", "var")},
        **{"zero": np.float32(0), "six": np.float32(6), "dw.weight": f32(8, 1, 2, 2), "dw.bias": f32(8)},
        **{"fc.weight": f32(5, 8), "fc.bias": f32(5)},
    )
    after = simplified(read_onnx(model, None))
    assert [(layer.name, layer.operator) for layer in find_layers(after)] == [
        ("conv", "conv2d"),
        ("dw", "conv2d"),
        ("fc", "linear"),
    ]
    shapes = {name: value.shape for name, value in weights_of(after).items()}
    assert shapes == {
        **{"conv.weight": (8, 3, 3, 3), "conv.bias": (1, 8, 1, 1), "dw.weight": (8, 1, 2, 2)},
        **{"dw.bias": (1, 8, 1, 1), "fc.weight": (8, 5), "fc.bias": (5,)},
    }
    kinds = [b for b in bindings(after) if b not in ("mean", "reshape", "nn.adaptive_avg_pool2d", "nn.avg_pool2d")]
    assert kinds == ["nn.conv2d", "add", "clip", "nn.conv2d", "add", "nn.relu", "matmul", "add"]


def test_a_quantized_onnx_model_keeps_its_form():
    node = helper.make_node
    model = onnx_model(
        [
            node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
            node("DequantizeLinear", ["fc.weight", "ws", "wz"], ["wd"], axis=0),
            node("DequantizeLinear", ["fc.bias", "bs", "bz"], ["bd"], axis=0),
            node("Gemm", ["xd", "wd", "bd"], ["y"], transB=1),
        ],
        {"x": [2, 8]},
        "y",
        **{
            "xs": np.float32(0.05),
            "xz": np.uint8(120),
            "ws": np.abs(f32(4)) * 0.01 + 0.001,
            "wz": np.zeros(4, np.int8),
        },
        **{"fc.weight": RANDOM.integers(-127, 127, (4, 8)).astype(np.int8)},
        **{"fc.bias": RANDOM.integers(-999, 999, 4).astype(np.int32)},
        **{"bs": np.abs(f32(4)) * 1e-3 + 1e-4, "bz": np.zeros(4, np.int32)},
    )
    after = simplified(read_onnx(model, None))
    (layer,) = find_layers(after)
    assert (layer.name, layer.operator) == ("fc", "linear")
    assert layer.weight_scale is not None
    weight = weights_of(after)[layer.weight.name]
    assert (weight.dtype, weight.shape) == (np.int8, (8, 4))
    assert bindings(after) == ["quantize", "dequantize", "dequantize", "matmul", "add"]


def test_a_torch_model():
    torch = pytest.importorskip("torch")
    from pumice.frontend.torch_model import read_torch

    nn = torch.nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1, bias=False), nn.BatchNorm1d(8), nn.ReLU())
            self.body = nn.Conv1d(8, 8, 3, stride=2)
            self.mix = nn.Linear(8, 8, bias=False)
            self.norm = nn.RMSNorm(8)
            self.head = nn.Sequential(nn.Dropout(), nn.Linear(8, 4), nn.GELU(), nn.LayerNorm(4))

        def forward(self, x):
            x = self.body(self.stem(x)).transpose(1, 2)
            return self.head(self.norm(self.mix(x)))

    torch.manual_seed(0)
    net = Net().eval()
    net.stem[1].running_var.uniform_(0.5, 2)
    net.stem[1].running_mean.normal_()
    after = simplified(read_torch(net, (torch.randn(2, 3, 9),)))
    names = [(layer.name, layer.operator, layer.weight.name) for layer in find_layers(after)]
    assert names == [
        ("stem.0", "conv2d", "stem.0.weight"),
        ("body", "conv2d", "body.weight"),
        ("mix", "linear", "mix.weight"),
        ("head.1", "linear", "head.1.weight"),
    ]
    found = bindings(after)
    assert found.count("nn.conv2d") == 2
    assert {"nn.rms_norm", "nn.gelu", "nn.layer_norm", "nn.relu"} <= set(found)
    assert not {"nn.conv1d", "nn.batch_norm", "nn.dropout", "broadcast_to"} & set(found)


@I.ir_module
class Small:
    @R.function
    def main(x: R.Tensor((2, 3), "float32"), a: R.Tensor((3, 4), "float32"), unused: R.Tensor((9,), "float32")):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.matmul(x, a)
            dead = R.nn.relu(y)  # noqa: F841
            z = R.nn.relu(y)
            R.output(z)
        return z


def test_the_walk_drops_what_nobody_reads():
    after = rewrite(scripted(Small), lambda rw, var, value: None)
    assert bindings(after) == ["matmul", "nn.relu"]
    assert list(weights_of(after)) == ["a"]
    relax.analysis.well_formed(after)


def test_the_walk_makes_names_unique():
    builder = relax.BlockBuilder()
    x = relax.Var("same", relax.TensorType((2,), "float32"))
    one = relax.DataflowVar("same", x.ty)
    two = relax.Var("same", x.ty)
    first, second = (builder.normalize(relax.op.nn.relu(v)) for v in (x, one))
    block = relax.DataflowBlock([relax.VarBinding(one, first), relax.VarBinding(two, second)])
    function = relax.Function([x], relax.SeqExpr([block], two), x.ty, True).with_attr("num_input", 1)
    mod = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    after = rewrite(mod, lambda rw, var, value: None)
    assert [b.var.name for b in after["main"].body.blocks[0].bindings] == ["same_1", "same_2"]
    assert [b.var.name for b in rewrite(after, lambda *_: None)["main"].body.blocks[0].bindings] == ["same_1", "same_2"]


def test_new_weights_with_a_taken_name_are_numbered_and_equal_ones_are_one():
    def visit(rw: Rewriter, var: relax.Var, value: relax.Expr):
        if isinstance(value, relax.Call) and value.op.name == "relax.nn.relu":
            new = [rw.weight("a", np.full((4,), v, np.float32)) for v in (1, 2, 1)]
            total = value.args[0]
            for weight in new:
                total = relax.op.add(total, weight)
            return total
        return None

    after = rewrite(scripted(Small), visit)
    assert {name: value.shape for name, value in weights_of(after).items()} == {"a": (3, 4), "a#2": (4,), "a#3": (4,)}


def test_control_flow_is_refused():
    @I.ir_module
    class Branch:
        @R.function
        def main(c: R.Tensor((), "bool"), x: R.Tensor((2,), "float32")) -> R.Tensor((2,), "float32"):
            R.func_attr({"num_input": 2})
            if c:  # noqa: SIM108
                y = R.nn.relu(x)
            else:
                y = R.negative(x)
            return y

    with pytest.raises(UnsupportedError, match="needs control flow"):
        SimplifyModel()(Branch)


def test_the_pipeline_is_registered():
    assert bindings(relax.get_pipeline("pumice.simplify")(scripted(Small))) == ["matmul", "nn.relu"]
