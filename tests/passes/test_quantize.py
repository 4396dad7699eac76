import numpy as np
import pytest
import tvm
from network import Network, residual_network
from tvm.relax import op as R
from tvm.script import ir as I
from tvm.script import relax as rx

from pumice.errors import ModelError
from pumice.module import layers_of, weights_of, with_output_names, with_weights
from pumice.passes.calibrate import Affine, Calibrate, with_ranges
from pumice.passes.dataflow import Dataflow, operands
from pumice.passes.evaluate import Evaluator
from pumice.passes.quantization_plan import QuantizeSpec, plan_quantization
from pumice.passes.quantize import Quantize


def bytes_read(mod, spec=None):
    """Who reads which tensor as bytes: ``{"reader": "tensor tensor"}``."""
    plan = plan_quantization(mod, spec or QuantizeSpec())
    graph = Dataflow(mod)
    reads = {}
    for var, value in graph.bindings:
        read = [v.name for v in dict.fromkeys(operands(value)) if v in plan.tensors and plan.reads_quantized(v, var)]
        if read:
            reads[var.name] = " ".join(read)
    return reads


def scale_groups(mod):
    """The tensors that make each other's scale, where there is more than one in a group."""
    observed = plan_quantization(mod, QuantizeSpec()).observed
    groups = {}
    for tensor, sources in observed.items():
        groups.setdefault(" ".join(s.name for s in sources), []).append(tensor.name)
    return {source: names for source, names in groups.items() if len(names) > 1}


def samples_for(mod, count=8, seed=1):
    rng = np.random.default_rng(seed)
    shapes = {var.name: [int(d) for d in var.ty.shape] for var in Dataflow(mod).inputs}
    return {name: rng.normal(0, 1, (count * s[0], *s[1:])).astype(np.float32) for name, s in shapes.items()}


def quantized(mod, spec=None, method="minmax", samples=None):
    return Quantize(spec)(Calibrate(samples or samples_for(mod), method, spec)(mod))


def snr(mod, other, sample):
    a, b = Evaluator(mod).run(sample), Evaluator(other).run(sample)
    return min(10 * np.log10(np.sum(a[k] ** 2) / np.sum((a[k] - b[k]) ** 2)) for k in a)


def well_formed(mod):
    tvm.relax.analysis.well_formed(tvm.IRModule({"main": mod["main"]}))  # raises


# The form


@I.ir_module
class Before:
    @rx.function
    def main(
        x: rx.Tensor((1, 4, 6, 6), "float32"),
        w1: rx.Tensor((8, 4, 3, 3), "float32"),
        b1: rx.Tensor((1, 8, 1, 1), "float32"),
        w2: rx.Tensor((4, 8, 1, 1), "float32"),
    ):
        rx.func_attr({"num_input": 1})
        with rx.dataflow():
            c1 = rx.nn.conv2d(x, w1, padding=1)
            d1 = rx.add(c1, b1)
            r1 = rx.nn.relu(d1)
            c2 = rx.nn.conv2d(r1, w2)
            rx.output(c2)
        return c2


@I.ir_module
class Expected:
    @rx.function
    def main(
        x: rx.Tensor((1, 4, 6, 6), "float32"),
        w1: rx.Tensor((8, 4, 3, 3), "int8"),
        b1: rx.Tensor((1, 8, 1, 1), "float32"),
        w2: rx.Tensor((4, 8, 1, 1), "int8"),
        w1_scale: rx.Tensor((8,), "float32"),
        w2_scale: rx.Tensor((4,), "float32"),
    ):
        rx.func_attr({"num_input": 1})
        with rx.dataflow():
            xq = rx.quantize(x, rx.const(0.5, "float32"), rx.const(100, "uint8"), out_dtype="uint8")
            xd = rx.dequantize(xq, rx.const(0.5, "float32"), rx.const(100, "uint8"))
            w1d = rx.dequantize(w1, w1_scale, rx.const(0, "int8"), axis=0)
            c1 = rx.nn.conv2d(xd, w1d, padding=1)
            d1 = rx.add(c1, b1)
            r1 = rx.nn.relu(d1)
            rq = rx.quantize(r1, rx.const(0.25, "float32"), rx.const(0, "uint8"), out_dtype="uint8")
            rd = rx.dequantize(rq, rx.const(0.25, "float32"), rx.const(0, "uint8"))
            w2d = rx.dequantize(w2, w2_scale, rx.const(0, "int8"), axis=0)
            c2 = rx.nn.conv2d(rd, w2d)
            rx.output(c2)
        return c2


def test_conv_relu_conv():
    """The bytes come after the activation, nothing in between; the output stays float."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (8, 4, 3, 3), "b1": (1, 8, 1, 1), "w2": (4, 8, 1, 1)}
    values = {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    mod = with_output_names(with_weights(Before, values), ["y"])
    after = Quantize()(with_ranges(mod, {"x": Affine(0.5, 100), "r1": Affine(0.25, 0)}))
    tvm.ir.assert_structural_equal(after["main"], Expected["main"])
    stored = weights_of(after)
    assert list(stored) == [p.name for p in after["main"].params[1:]] == ["w1", "b1", "w2", "w1.scale", "w2.scale"]
    np.testing.assert_array_equal(stored["w1.scale"], np.abs(values["w1"]).max((1, 2, 3)) / np.float32(127))
    np.testing.assert_array_equal(np.abs(stored["w1"].astype(int)).max((1, 2, 3)), 127)
    error = stored["w1"] * stored["w1.scale"].reshape(-1, 1, 1, 1) - values["w1"]
    assert (np.abs(error) <= stored["w1.scale"].reshape(-1, 1, 1, 1) * 0.5001).all()
    np.testing.assert_array_equal(stored["b1"], values["b1"])
    record = layers_of(after)["w1"]
    assert (record.dtype, record.input_scale, record.input_zero_point) == ("int8", 0.5, 100)
    assert (record.output_scale, record.output_zero_point) == (0.25, 0)
    assert layers_of(after)["w2"].output_scale is None


# The plan


def test_residual_blocks():
    """An add joins the epilogue of the later convolution; its other operand is bytes."""
    assert bytes_read(residual_network()) == {
        "stem": "image",
        "pool": "stem.relu",
        "a1": "pool",
        "a2": "a1.relu",
        "a.add": "pool",
        "b0": "a.relu",
        "b1": "a.relu",
        "b2": "b1.relu",
        "b.add": "b0.biased",
        "mean": "b.relu",
        "fc": "mean",
    }
    assert scale_groups(residual_network()) == {"stem.relu": ["stem.relu", "pool"]}


def test_add_without_a_convolution_that_ends_in_it():
    """Both operands are bytes where neither is a bare layer result."""
    net = Network()
    x = net.relu("r0", net.conv("c0", net.input("x", (1, 4, 8, 8)), 8))
    y = net.relu("r1", net.conv("c1", x, 8))
    out = net.conv("c2", net.add("sum", x, y), 8)
    assert bytes_read(net.finish(y=out)) == {"c0": "x", "c1": "r0", "sum": "r0 r1", "c2": "sum"}


def test_add_whose_result_is_also_an_output_stays_float():
    net = Network()
    x = net.relu("r0", net.conv("c0", net.input("x", (1, 4, 8, 8)), 8))
    total = net.add("sum", net.conv("c1", x, 8), x)
    out = net.conv("c2", total, 8)
    assert bytes_read(net.finish(y=out, features=total)) == {"c0": "x", "c1": "r0", "c2": "sum"}


def test_depthwise_and_inverted_residual():
    net = Network()
    x = net.conv("stem", net.input("x", (1, 4, 8, 8)), 8)
    y = net.call("expand.relu6", R.clip(net.conv("expand", x, 32), 0, 6))
    y = net.call("depthwise.relu6", R.clip(net.conv("depthwise", y, 32, 3, padding=1, groups=32), 0, 6))
    x = net.add("sum", net.conv("project", y, 8), x)
    out = net.conv("next", x, 8)
    mod = net.finish(y=out)
    assert bytes_read(mod) == {
        "stem": "x",
        "expand": "stem.biased",
        "depthwise": "expand.relu6",
        "project": "depthwise.relu6",
        "sum": "stem.biased",
        "next": "sum",
    }
    assert snr(mod, quantized(mod), samples_for(mod, 1, seed=2)) > 25


def test_linear_gelu_linear():
    net = Network()
    x = net.call("gelu", R.nn.gelu(net.linear("up", net.input("x", (1, 6, 16)), 64)))
    assert bytes_read(net.finish(y=net.linear("down", x, 16))) == {"up": "x", "down": "gelu"}


def transformer(net, x):
    """A post-norm block: attention over one head, then a feed-forward part."""
    q, k, v = (net.linear(name, x, 16) for name in "qkv")
    scores = net.call("scores", R.matmul(q, net.call("k.t", R.permute_dims(k, [0, 2, 1]))))
    context = net.call("context", R.matmul(net.call("softmax", R.nn.softmax(scores)), v))
    y = net.linear("o", net.call("heads", R.reshape(context, (1, 6, 16))), 16)
    x = net.norm("norm1", net.add("add1", y, x))
    y = net.call("gelu", R.nn.gelu(net.linear("up", x, 32)))
    return net.norm("norm2", net.add("add2", net.linear("down", y, 16), x))


def test_transformer_keeps_its_residual_stream_float():
    net = Network()
    x = net.norm("norm0", net.input("x", (1, 6, 16)))
    mod = net.finish(y=net.linear("head", transformer(net, transformer(net, x)), 4))
    reads = bytes_read(mod)
    for add in ("add1", "add2", "scores", "softmax"):
        assert add not in reads
    assert reads["q"] == reads["k"] == reads["v"] == "norm2"
    assert reads["o"] == "heads" and reads["heads"] == "context"
    assert reads["up"] == "norm1" and reads["down"] == "gelu" and reads["head"] == "norm2"
    assert snr(mod, quantized(mod), samples_for(mod, 1, seed=2)) > 20


def test_squeeze_and_excitation():
    """The gate is computed in float on a few values; what it scales is read as bytes by pool and product."""
    net = Network()
    x = net.relu("r0", net.conv("c0", net.input("x", (1, 4, 8, 8)), 16))
    gate = net.call("mean", R.mean(x, [2, 3], keepdims=True))
    gate = net.relu("squeeze.relu", net.conv("squeeze", gate, 4))
    gate = net.call("gate", R.sigmoid(net.conv("excite", gate, 16)))
    out = net.conv("c1", net.call("scaled", R.multiply(x, gate)), 8)
    assert bytes_read(net.finish(y=out)) == {
        "c0": "x",
        "mean": "r0",
        "squeeze": "mean",
        "excite": "squeeze.relu",
        "scaled": "r0",
        "c1": "scaled",
    }


def test_hard_swish_is_part_of_the_epilogue():
    """Its own steps read the float value, in registers."""
    net = Network()
    x = net.conv("c0", net.input("x", (1, 4, 8, 8)), 8)
    three, sixth = (tvm.relax.const(np.float32(v)) for v in (3, 1 / 6))
    y = net.call("clip", R.clip(net.call("plus3", R.add(x, three)), 0, 6))
    y = net.call("hswish", R.multiply(net.call("product", R.multiply(x, y)), sixth))
    assert bytes_read(net.finish(y=net.conv("c1", y, 8))) == {"c0": "x", "c1": "hswish"}


def test_concat_shares_one_scale():
    net = Network()
    x = net.relu("r0", net.conv("c0", net.input("x", (1, 4, 8, 8)), 8))
    a = net.relu("ra", net.conv("ca", x, 8))
    b = net.relu("rb", net.conv("cb", x, 8, 3, padding=1))
    both = net.call("both", R.concat((a, b), axis=1))
    mod = net.finish(y=net.conv("c1", both, 8))
    assert bytes_read(mod) == {"c0": "x", "ca": "r0", "cb": "r0", "both": "ra rb", "c1": "both"}
    assert scale_groups(mod) == {"ra rb": ["ra", "rb", "both"]}
    after = quantized(mod)
    layers = layers_of(after)
    assert layers["ca"].output_scale == layers["cb"].output_scale == layers["c1"].input_scale


def test_split_and_shuffle():
    net = Network()
    x = net.relu("r0", net.conv("c0", net.input("x", (1, 4, 8, 8)), 8))
    parts = net.call("parts", R.split(x, 2, axis=1))
    a, b = (net.call(f"part{i}", tvm.relax.TupleGetItem(parts, i)) for i in range(2))
    a = net.relu("ra", net.conv("ca", a, 4))
    mod = net.finish(y=net.conv("c1", net.call("both", R.concat((a, b), axis=1)), 8))
    assert bytes_read(mod) == {"c0": "x", "parts": "r0", "ca": "part0", "both": "ra part1", "c1": "both"}
    well_formed(quantized(mod))


def test_relu_behind_a_pool_reads_bytes():
    net = Network()
    x = net.call("pool", R.nn.max_pool2d(net.conv("c0", net.input("x", (1, 4, 8, 8)), 8), (2, 2), (2, 2)))
    mod = net.finish(y=net.conv("c1", net.relu("r", x), 8))
    assert bytes_read(mod) == {"c0": "x", "pool": "c0.biased", "r": "pool", "c1": "r"}


def test_a_shared_input_is_rounded_once():
    net = Network()
    x = net.input("x", (1, 4, 8, 8))
    mod = net.finish(a=net.conv("ca", x, 8), b=net.conv("cb", x, 8))
    after = quantized(mod)
    assert [Dataflow(after).op(v) for v in Dataflow(after).value].count("quantize") == 1


def test_float_layers_and_their_reason():
    mod = residual_network()
    spec = QuantizeSpec(keep_float=("fc", "b?"))
    reads = bytes_read(mod, spec)
    assert "fc" not in reads and "b1" not in reads and reads["a2"] == "a1.relu"
    layers = layers_of(quantized(mod, spec))
    assert layers["b2"].dtype == "float32" and layers["b2"].reason == "kept float by the pattern 'b?'"
    assert layers["a1"].dtype == "int8"


def test_a_shared_weight_has_one_form():
    net = Network()
    x = net.input("x", (1, 4, 8))
    w = net.weight("tied.weight", net.rng.normal(0, 1, (8, 8)).astype(np.float32))
    y = net.linear("second", net.linear("first", x, 8, weight=w), 8, weight=w)
    mod = net.finish(y=y)
    assert weights_of(quantized(mod))["tied.weight"].dtype == np.int8
    layers = layers_of(quantized(mod, QuantizeSpec(keep_float=("tied#2",))))
    assert layers["tied"].reason == "shares its weight with tied#2, which stays float"


def test_a_float_weight_on_data_that_the_model_quantized_stays_float():
    net = Network()
    scale, zero = tvm.relax.const(0.1, "float32"), tvm.relax.const(0, "uint8")
    q = net.call("q", R.quantize(net.input("x", (2, 8)), scale, zero, out_dtype="uint8"))
    d = net.call("d", R.dequantize(q, scale, zero, out_dtype="float32"))
    mod = Quantize()(net.finish(y=net.linear("fc", d, 8)))
    assert layers_of(mod)["fc"].reason.startswith("its data was quantized in the model, its weight was not")


def test_a_weight_that_is_also_looked_up_stays_float():
    net = Network()
    table = net.weight("table", net.rng.normal(0, 1, (8, 8)).astype(np.float32))
    x = net.call("embedded", R.take(table, net.input("ids", (4,), "int32"), axis=0))
    mod = net.finish(y=net.linear("head", x, 8, weight=table))
    assert layers_of(Quantize()(mod))["table"].reason == "its weight is also read by take in float"


def test_accumulators_that_could_overflow_stay_float():
    """What counts is the weights that there are, not how many: mostly zero ones fit."""
    net = Network()
    x = net.relu("r", net.input("x", (1, 70_000)))
    full = net.weight("full.weight", np.ones((70_000, 2), np.float32))
    sparse = net.weight("sparse.weight", np.where(np.arange(70_000)[:, None] % 4, 0, np.ones((1, 2))).astype("f"))
    mod = net.finish(a=net.linear("full", x, 2, weight=full), b=net.linear("sparse", x, 2, weight=sparse))
    plan = plan_quantization(mod, QuantizeSpec())
    assert [layer.name for layer in plan.layers] == ["sparse"]
    assert "int32 accumulator" in plan.float_reasons["full"]


# The numbers


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
def test_residual_network_is_near_float(method):
    """Each of about eight roundings to a byte in sequence adds noise 35 to 45 dB down; together 25 dB is safe."""
    mod = residual_network()
    after = quantized(mod, method=method, samples=samples_for(mod, 32))
    well_formed(after)
    assert all(layer.dtype == "int8" for layer in layers_of(after).values())
    assert snr(mod, after, samples_for(mod, 1, seed=2)) > (25 if method != "entropy" else 15)


def test_zeros_stay_zero():
    mod = residual_network()
    rng = np.random.default_rng(3)
    sparse = {
        name: np.where(rng.random(w.shape) < 0.8, 0, w).astype(w.dtype) if name.endswith("weight") else w
        for name, w in weights_of(mod).items()
    }
    after = weights_of(quantized(with_weights(mod, sparse)))
    for name, weight in sparse.items():
        if name.endswith("weight"):
            assert (after[name][weight == 0] == 0).all()
            assert weights_of(mod)[name].shape == after[name].shape


def test_twice_is_once():
    mod = residual_network()
    for spec in (QuantizeSpec(), QuantizeSpec(keep_float=("fc",))):
        once = quantized(mod, spec)
        twice = Quantize(spec)(once)
        tvm.ir.assert_structural_equal(once["main"], twice["main"])
        assert layers_of(once) == layers_of(twice)
        again = Quantize(spec)(Calibrate(samples_for(mod), "minmax", spec)(once))
        tvm.ir.assert_structural_equal(once["main"], again["main"])


def test_a_weight_twice_as_large_gives_an_output_twice_as_large():
    net = Network()
    mod = net.finish(y=net.linear("fc", net.relu("r", net.linear("up", net.input("x", (4, 16)), 32)), 8, bias=False))
    samples = samples_for(mod)
    doubled = with_weights(mod, {n: w * 2 if n == "fc.weight" else w for n, w in weights_of(mod).items()})
    one, two = (Evaluator(quantized(m, samples=samples)) for m in (mod, doubled))
    sample = samples_for(mod, 1, seed=5)
    np.testing.assert_array_equal(one.run(sample)["y"] * 2, two.run(sample)["y"])


def test_a_bias_that_the_weights_cannot_express():
    """Channels that batch norm shut off: no weights or tiny ones, and a bias that must come out right."""
    net = Network()
    w = net.rng.normal(0, 1, (8, 4, 1, 1)).astype(np.float32)
    w[0], w[1], w[2] = 0, w[1] * 1e-12, w[2] * 1e-38
    x = net.input("x", (1, 4, 8, 8))
    y = net.conv("c", x, 8, weight=net.weight("c.weight", w))
    mod = net.finish(y=y)
    after = quantized(mod)
    stored, sx = weights_of(after), layers_of(after)["c"].input_scale
    in_units = stored["c.bias"].reshape(-1) / (sx * stored["c.weight.scale"].astype(np.float64))
    assert (np.abs(in_units) <= 2**30 * 1.001).all()
    back = np.rint(in_units) * sx * stored["c.weight.scale"]
    np.testing.assert_allclose(back, stored["c.bias"].reshape(-1), atol=0.01)
    np.testing.assert_allclose(back[:3], stored["c.bias"].reshape(-1)[:3], rtol=1e-6)
    np.isfinite(Evaluator(after).run(samples_for(mod, 1))["y"]).all()


def test_what_is_added_per_position_is_no_bias():
    net = Network()
    x = net.linear("embed", net.input("x", (1, 8, 8)), 8, bias=False)
    positions = net.weight("positions", net.rng.normal(0, 1, (8, 1)).astype(np.float32))
    mod = net.finish(y=net.linear("fc", net.add("placed", x, positions), 8))
    assert bytes_read(mod) == {"embed": "x", "fc": "placed"}
    assert snr(mod, quantized(mod), samples_for(mod, 1, seed=2)) > 30


# What cannot be


def test_without_calibration():
    with pytest.raises(ModelError, match=r"network\.onnx: layer stem .* without calibration"):
        Quantize()(residual_network())


def test_calibrated_for_another_graph():
    mod = with_ranges(residual_network(), {"image": Affine(1.0, 0)})
    with pytest.raises(ModelError, match=r"no range for tensor 'stem\.relu'"):
        Quantize()(mod)


def test_a_module_quantized_elsewhere_is_left_alone():
    once = quantized(residual_network())
    assert plan_quantization(once, QuantizeSpec()).layers == []
