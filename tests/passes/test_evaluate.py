import numpy as np
import pytest
import reference
import tvm
from network import Network, residual_network
from tvm.relax import op as R

from pumice.errors import ModelError
from pumice.module import layers_of, weights_of, with_layers, with_weights
from pumice.passes import evaluate
from pumice.passes.calibrate import Calibrate
from pumice.passes.correct_bias import CorrectBias
from pumice.passes.dataflow import Dataflow
from pumice.passes.evaluate import Evaluator, SharedEvaluator
from pumice.passes.layer_error import RecordLayerErrors, layer_results
from pumice.passes.layers import find_layers
from pumice.passes.pipeline import lower
from pumice.passes.quantize import Quantize


@pytest.mark.parametrize(
    ("groups", "stride", "padding", "dilation"),
    [(1, (1, 1), (0, 0, 0, 0), (1, 1)), (2, (2, 1), (1, 0, 2, 1), (1, 2)), (4, (1, 2), (1, 1, 1, 1), (2, 1))],
)
def test_convolution(groups, stride, padding, dilation):
    """Small integers are exact in float32, whatever the order of the sum."""
    rng = np.random.default_rng(0)
    x, w = rng.integers(0, 256, (2, 4, 9, 8), np.uint8), rng.integers(-9, 9, (8, 4 // groups, 3, 3), np.int8)
    net = Network()
    var, weight = net.input("x", x.shape), net.weight("w", w.astype(np.float32))
    call = R.nn.conv2d(var, weight, strides=stride, padding=padding, dilation=dilation, groups=groups)
    mod = net.finish(y=net.call("conv", call))
    expected = reference.conv_accumulate(x, 0, w, np.zeros(8, np.int32), stride, padding, dilation, groups)
    np.testing.assert_array_equal(Evaluator(mod).run({"x": x.astype(np.float32)})["y"], expected)


def test_products_of_activations_and_of_integers():
    net = Network()
    a, b = net.input("a", (2, 3, 4)), net.input("b", (2, 4, 5))
    i, j = net.input("i", (3, 4), "int32"), net.input("j", (4, 2), "int32")
    mod = net.finish(float=net.call("f", R.matmul(a, b)), integer=net.call("n", R.matmul(i, j)))
    shapes = {var.name: [int(d) for d in var.ty.shape] for var in (a, b, i, j)}
    inputs = {name: np.arange(np.prod(shape)).reshape(shape) for name, shape in shapes.items()}
    outputs = Evaluator(mod).run(inputs)
    np.testing.assert_array_equal(outputs["float"], inputs["a"] @ inputs["b"])
    np.testing.assert_array_equal(outputs["integer"], inputs["i"] @ inputs["j"])
    assert outputs["integer"].dtype == np.int32


def test_taps_are_values_on_the_way():
    mod = residual_network()
    graph = Dataflow(mod)
    taps = [var for var in graph.value if var.name in ("stem.relu", "mean")]
    evaluator = Evaluator(mod, taps)
    sample = {"image": np.random.default_rng(0).normal(0, 1, (1, 4, 12, 12)).astype(np.float32)}
    stem, mean = evaluator.observe(sample)
    assert stem.shape == (1, 16, 12, 12) and (stem >= 0).all()
    logits = mean @ weights_of(mod)["fc.weight"] + weights_of(mod)["fc.bias"]
    np.testing.assert_allclose(evaluator.run(sample)["logits"], logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(evaluator.run(sample)["logits"], Evaluator(mod).run(sample)["logits"])


def test_rounding_is_half_to_even():
    net = Network()
    x = net.input("x", (9,))
    scale, zero_point = tvm.relax.const(2.0, "float32"), tvm.relax.const(np.array(10, np.uint8), "uint8")
    q = net.call("q", R.quantize(x, scale, zero_point, out_dtype="uint8"))
    mod = net.finish(q=q, back=net.call("d", R.dequantize(q, scale, zero_point)))
    values = np.array([1, 3, 5, -1, -3, 600, -600, 0.9999999, np.inf], np.float32)
    outputs = Evaluator(mod).run({"x": values})
    np.testing.assert_array_equal(outputs["q"], reference.quantize_u8(values, 2.0, 10))
    np.testing.assert_array_equal(outputs["back"], reference.dequantize(outputs["q"], 2.0, 10))


def test_a_quantized_layer_is_its_integer_definition_to_one_step():
    """Quantize and dequantize around float operators mean the integers; float sums may move a tie by one."""
    rng = np.random.default_rng(4)
    net = Network()
    x = net.relu("r1", net.conv("c1", net.input("x", (1, 8, 9, 9)), 16, 3, stride=2, padding=1))
    mod = net.finish(y=net.conv("c2", x, 4))
    samples = rng.normal(0, 1, (8, 8, 9, 9)).astype(np.float32)
    after = Quantize()(Calibrate({"x": samples}, "minmax")(mod))
    rounded = next(
        var for var in Dataflow(after).value if Dataflow(after).op(var) == "quantize" and var.name[:2] == "c2"
    )
    (found,) = Evaluator(after, [rounded]).observe({"x": samples[:1]})
    layer, w = layers_of(after)["c1"], weights_of(after)
    sx, zx, sy, zy = layer.input_scale, layer.input_zero_point, layer.output_scale, layer.output_zero_point
    expected = reference.conv_int8(
        reference.quantize_u8(samples[:1], sx, zx),
        zx,
        w["c1.weight"],
        reference.quantize_bias(w["c1.bias"].reshape(-1), sx, w["c1.weight.scale"]),
        reference.multiplier(sx, w["c1.weight.scale"], sy),
        zy,
        lo=zy,
        stride=(2, 2),
        padding=(1, 1, 1, 1),
    )
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_a_scalar_input_and_a_missing_one():
    net = Network()
    x, factor = net.input("x", (3,)), net.input("factor", ())
    evaluator = Evaluator(net.finish(y=net.call("y", R.multiply(x, factor))))
    np.testing.assert_array_equal(evaluator.run({"x": np.arange(3), "factor": np.array(2)})["y"], [0, 2, 4])
    with pytest.raises(ModelError, match="no array for input 'factor'"):
        evaluator.run({"x": np.arange(3)})


def test_passes_that_share_an_evaluator_compile_once(monkeypatch):
    """And find what they find alone."""
    mod = residual_network()
    samples = {"image": np.random.default_rng(1).normal(0, 1, (8, 4, 12, 12)).astype(np.float32)}
    compiled = []
    monkeypatch.setattr(evaluate, "lower", lambda *args: compiled.append(args) or lower(*args))

    def road(evaluator):
        given = [] if evaluator is None else [evaluator]
        after = Quantize()(Calibrate(samples, "minmax", None, None, *given)(mod))
        after = CorrectBias(mod, samples, 256, *given)(after)
        return RecordLayerErrors(mod, samples, 8, *given)(after)

    alone = road(None)
    assert len(compiled) == 4
    foreseen = [*(layer.data for layer in find_layers(mod)), *layer_results(mod).values()]
    shared = road(SharedEvaluator(foreseen=foreseen))
    assert len(compiled) == 4 + 2  # the float module, and the quantized one
    for one, other in zip(layers_of(alone).values(), layers_of(shared).values(), strict=True):
        assert one.snr_db == pytest.approx(other.snr_db, abs=0.1)
    for name, value in weights_of(alone).items():
        np.testing.assert_allclose(weights_of(shared)[name], value, rtol=1e-4, atol=1e-6)


def test_another_module_or_another_variable_is_compiled_for_itself():
    mod = residual_network()
    first, last = [var for var in Dataflow(mod).value if var.name in ("stem.relu", "mean")]
    shared = SharedEvaluator()
    evaluator = shared.of(mod, [first])
    assert shared.of(with_layers(mod, {}), [first]) is evaluator  # records change no number
    assert shared.of(mod, [last]) is not evaluator
    sample = {"image": np.ones((1, 4, 12, 12), np.float32)}
    doubled = with_weights(mod, {name: 2 * value for name, value in weights_of(mod).items()})
    (value,), (other,) = (shared.of(each, [first]).observe(sample) for each in (mod, doubled))
    np.testing.assert_allclose(other, 2 * value, rtol=1e-5, atol=1e-5)


def test_the_module_that_is_shared_may_be_named_before_another_is_asked_for():
    mod = residual_network()
    first, last = [var for var in Dataflow(mod).value if var.name in ("stem.relu", "mean")]
    doubled = with_weights(mod, {name: 2 * value for name, value in weights_of(mod).items()})
    shared = SharedEvaluator(mod, [last])
    assert shared.of(doubled, [first]) is not shared.of(doubled, [first])
    assert shared.of(mod, [first]) is shared.of(mod, [last])
