import numpy as np
import pytest
from network import Network
from tvm.relax import op as R

from pumice.errors import ModelError, UsageError
from pumice.module import layers_of, weights_of, with_weights
from pumice.passes.calibrate import Calibrate
from pumice.passes.dataflow import Dataflow
from pumice.passes.equalize import EqualizeChannels
from pumice.passes.evaluate import Evaluator
from pumice.passes.quantize import Quantize
from pumice.passes.rewriting import shape_of
from pumice.passes.smooth_activations import SmoothActivations, find_smoothable
from pumice.passes.sparsity import RecordLayers

_ROUNDING = dict(rtol=3e-5, atol=3e-5)
TOKENS, WIDTH, HEADS = 6, 8, 2


def with_outliers(mod, name, channels=(2, 5), factor=40.0):
    """The module with some channels of a norm's parameters far larger than the others."""
    weights = {key: array.copy() for key, array in weights_of(mod).items()}
    weights[f"{name}.weight"][list(channels)] *= factor
    if f"{name}.bias" in weights:
        weights[f"{name}.bias"][:] = np.linspace(-1, 1, len(weights[f"{name}.bias"]))
    return with_weights(mod, weights)


def norm_and_layer(also=None):
    """layer_norm -> linear; ``also`` adds another reader of the norm and gives its result."""
    net = Network()
    y = net.norm("norm", net.input("x", (1, TOKENS, WIDTH)))
    outputs = {"z": net.linear("fc", y, 5)}
    return with_outliers(net.finish(**outputs, **({"w": also(net, y)} if also else {})), "norm")


def encoder(hidden=R.nn.relu, mask=False):
    """One layer of a transformer that normalizes behind its residual adds."""
    net = Network()
    x = net.norm("enter", net.input("x", (1, TOKENS, WIDTH)))
    if mask:
        net.input("attention_mask", (1, TOKENS), "int64")
    q, k, v = (net.linear(name, x, WIDTH) for name in ("q", "k", "v"))
    heads = [net.call(f"{y.name}.heads", R.reshape(y, (1, TOKENS, HEADS, WIDTH // HEADS))) for y in (q, k, v)]
    joined = net.call("joined", R.reshape(net.call("attention", R.nn.attention(*heads)), (1, TOKENS, WIDTH)))
    x = net.norm("middle", net.add("first", net.linear("out", joined, WIDTH), x))
    y = net.call("hidden", hidden(net.linear("up", x, 2 * WIDTH)))
    x = net.norm("last", net.add("second", net.linear("down", y, WIDTH), x))
    mod = net.finish(y=net.linear("head", x, 3))
    return with_outliers(with_outliers(mod, "enter"), "middle", (0,))


def samples(mod, count=4, seed=1):
    rng = np.random.default_rng(seed)
    given = {}
    for var in Dataflow(mod).inputs:
        shape = (count, *shape_of(var)[1:])
        given[var.name] = (
            rng.normal(0, 1, shape).astype(np.float32) if str(var.ty.dtype) == "float32" else np.ones(shape, np.int64)
        )
    return given


def outputs(mod, given):
    evaluator = Evaluator(mod)
    count = len(next(iter(given.values())))
    runs = [evaluator.run({name: array[i : i + 1] for name, array in given.items()}) for i in range(count)]
    return [np.concatenate([run[name] for run in runs]) for name in runs[0]]


def assert_same_function(before, after, seed=2):
    given = samples(before, seed=seed)
    for a, b in zip(outputs(before, given), outputs(after, given), strict=True):
        np.testing.assert_allclose(b, a, **_ROUNDING)


def layer_norm(x, gamma, beta):
    x = x.astype(np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * gamma + beta


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.8, 1.0])
def test_factors_by_hand(strength):
    mod = norm_and_layer()
    given = samples(mod)
    before, after = weights_of(mod), weights_of(SmoothActivations(given, strength)(mod))
    reached = np.abs(layer_norm(given["x"], before["norm.weight"], before["norm.bias"])).max((0, 1))
    read = np.abs(before["fc.weight"]).max(1)
    factors = reached**strength / read ** (1 - strength)
    factors /= np.exp(np.log(factors).mean())
    np.testing.assert_allclose(after["norm.weight"], before["norm.weight"] / factors, rtol=1e-4)
    np.testing.assert_allclose(after["norm.bias"], before["norm.bias"] / factors, rtol=1e-4)
    np.testing.assert_allclose(after["fc.weight"], before["fc.weight"] * factors[:, None], rtol=1e-4)
    np.testing.assert_array_equal(after["fc.bias"], before["fc.bias"])


def test_a_norm_that_layers_alone_read_is_scaled_in_place():
    mod = norm_and_layer()
    after = SmoothActivations(samples(mod))(mod)
    assert [Dataflow(after).op(v) for v, _ in Dataflow(after).bindings].count("nn.layer_norm") == 1
    assert_same_function(mod, after)


@pytest.mark.parametrize(
    "other", [lambda net, y: net.call("other", R.sigmoid(y)), lambda net, y: net.add("other", y, y), lambda net, y: y]
)
def test_what_other_readers_see_stays(other):
    mod = norm_and_layer(other)
    after = SmoothActivations(samples(mod))(mod)
    given = samples(mod, seed=5)
    (z, w), (z_after, w_after) = outputs(mod, given), outputs(after, given)
    np.testing.assert_array_equal(w_after, w)
    np.testing.assert_allclose(z_after, z, **_ROUNDING)
    assert not np.array_equal(weights_of(after)["fc.weight"], weights_of(mod)["fc.weight"])


def test_an_encoder_computes_the_same():
    mod = encoder()
    assert_same_function(mod, SmoothActivations(samples(mod))(mod))


@pytest.mark.parametrize("strength", [0.5, "search"])
def test_outliers_cost_less_when_rounded(strength):
    mod = norm_and_layer()
    weights = {name: array.copy() for name, array in weights_of(mod).items()}
    weights["fc.weight"][[2, 5]] /= 40  # wide channels that tell no more than others, as trained networks have
    mod = with_weights(mod, weights)
    given, held = samples(mod, 16), samples(mod, 8, seed=9)
    (exact,) = outputs(mod, held)
    noise = []
    for one in (mod, SmoothActivations(given, strength)(mod)):
        (rounded,) = outputs(Quantize()(Calibrate(given, "minmax")(one)), held)
        noise.append(float(np.square(rounded - exact).sum()))
    assert noise[1] < noise[0] / 3


def test_what_is_smoothed_in_an_encoder():
    mod = encoder()
    graph = Dataflow(mod)
    found = {one.tensor.name: one for one in find_smoothable(mod, graph)}
    assert {name: [layer.name for layer in one.readers] for name, one in found.items()} == {
        "enter": ["q", "k", "v"],
        "joined": ["out"],
        "middle": ["up"],
        "last": ["head"],
    }
    assert found["joined"].source is not None and found["joined"].source.name == "v"
    np.testing.assert_array_equal(found["joined"].channels, np.arange(WIDTH))


def test_values_shrink_by_the_factors_that_their_reader_grows_by():
    mod = encoder()
    before, after = weights_of(mod), weights_of(SmoothActivations(samples(mod))(mod))
    factors = after["out.weight"][:, 0] / before["out.weight"][:, 0]
    assert factors.max() > 1.2 * factors.min()
    np.testing.assert_allclose(after["out.weight"], before["out.weight"] * factors[:, None], rtol=1e-4)
    np.testing.assert_allclose(after["v.bias"], before["v.bias"] / factors, rtol=1e-4)


def test_it_leaves_streams_between_layers_to_equalization():
    mod = encoder()
    given = samples(mod)
    smoothed = SmoothActivations(given)(mod)
    both = EqualizeChannels(given)(smoothed)
    first, second = weights_of(smoothed), weights_of(both)
    changed = {name for name in first if not np.array_equal(first[name], second[name])}
    assert changed == {"up.weight", "up.bias", "down.weight"}
    np.testing.assert_array_equal(weights_of(mod)["down.weight"], first["down.weight"])
    assert_same_function(mod, both)


def test_gelu_is_not_homogeneous():
    mod = encoder(R.nn.gelu)
    assert "hidden" not in {one.tensor.name for one in find_smoothable(mod, Dataflow(mod))}


def fused_projection(read_keys=False):
    """Queries, keys and values from one layer; ``read_keys`` has the values overlap with what are keys elsewhere."""
    net = Network()
    x = net.norm("norm", net.input("x", (1, TOKENS, WIDTH)))
    qkv = net.linear("qkv", x, 3 * WIDTH)
    firsts = (0, WIDTH, WIDTH if read_keys else 2 * WIDTH)
    parts = [net.call(f"p{i}", R.strided_slice(qkv, [2], [f], [f + WIDTH])) for i, f in enumerate(firsts)]
    heads = [net.call(f"h{i}", R.reshape(p, (1, TOKENS, HEADS, WIDTH // HEADS))) for i, p in enumerate(parts)]
    joined = net.call("joined", R.reshape(net.call("attention", R.nn.attention(*heads)), (1, TOKENS, WIDTH)))
    return net.finish(y=net.linear("out", joined, 3))


def test_values_out_of_one_projection():
    mod = fused_projection()
    found = {one.tensor.name: one for one in find_smoothable(mod, Dataflow(mod))}
    np.testing.assert_array_equal(found["joined"].channels, np.arange(2 * WIDTH, 3 * WIDTH))
    after = SmoothActivations(samples(mod))(mod)
    assert_same_function(mod, after)
    np.testing.assert_array_equal(weights_of(after)["qkv.bias"][: 2 * WIDTH], weights_of(mod)["qkv.bias"][: 2 * WIDTH])


def test_values_that_are_keys_too_stay():
    mod = fused_projection(read_keys=True)
    assert "joined" not in {one.tensor.name for one in find_smoothable(mod, Dataflow(mod))}


def gated(squared=False):
    """silu(gate) * up -> down, behind an RMS norm."""
    net = Network()
    gamma = net.weight("norm.weight", np.ones(WIDTH, np.float32))
    x = net.call("norm", R.nn.rms_norm(net.input("x", (1, TOKENS, WIDTH)), gamma, axes=[-1]))
    up = net.linear("up", x, 12)
    gate = net.call("gate.silu", R.nn.silu(up if squared else net.linear("gate", x, 12)))
    return net.finish(y=net.linear("down", net.call("gated", R.multiply(gate, up)), WIDTH))


def test_gated_product():
    mod = with_outliers(gated(), "norm")
    found = {one.tensor.name: one for one in find_smoothable(mod, Dataflow(mod))}
    assert found["gated"].source.name == "up" and found["norm"].source is None
    after = SmoothActivations(samples(mod))(mod)
    assert_same_function(mod, after)
    np.testing.assert_array_equal(weights_of(after)["gate.bias"], weights_of(mod)["gate.bias"])


def test_a_product_with_its_own_function_stays():
    mod = gated(squared=True)
    assert {one.tensor.name for one in find_smoothable(mod, Dataflow(mod))} == {"norm"}


def test_zero_weights_stay_zero_and_unread_channels_do_not_widen_the_range():
    mod = norm_and_layer()
    weights = {name: array.copy() for name, array in weights_of(mod).items()}
    weights["fc.weight"][::3, 1:4] = 0
    weights["fc.weight"][2] = 0  # an outlier that no weight reads
    weights["norm.weight"][6], weights["norm.bias"][6] = 0, 0  # a channel that is never active
    mod = with_weights(mod, weights)
    given = samples(mod)
    after = SmoothActivations(given)(mod)
    for name, array in weights.items():
        np.testing.assert_array_equal(weights_of(after)[name] == 0, array == 0)
    new = weights_of(after)
    reached = np.abs(layer_norm(given["x"], new["norm.weight"], new["norm.bias"])).max((0, 1))
    assert reached[2] <= np.median(reached) * 1.01
    assert_same_function(mod, after)


def test_padding_does_not_count():
    net = Network()
    x = net.norm("norm", net.input("x", (1, TOKENS, WIDTH)))
    net.input("attention_mask", (1, TOKENS), "int64")
    mod = net.finish(z=net.linear("fc", x, 5))
    given = samples(mod)
    given["attention_mask"][:, 3:] = 0
    shifted = {**given, "x": given["x"].copy()}
    shifted["x"][:, 3:, 2] = 30  # what lies behind the padding changes nothing
    first, second = (weights_of(SmoothActivations(each)(mod)) for each in (given, shifted))
    np.testing.assert_array_equal(first["fc.weight"], second["fc.weight"])
    every = weights_of(SmoothActivations({**shifted, "attention_mask": np.ones_like(given["attention_mask"])})(mod))
    assert not np.array_equal(first["fc.weight"], every["fc.weight"])


def test_shared_weights_stay():
    net = Network()
    w = net.weight("shared.weight", np.geomspace(0.1, 1, 64, dtype=np.float32).reshape(8, 8))
    x = net.norm("norm", net.input("x", (1, TOKENS, WIDTH)))
    mod = net.finish(y=net.linear("b", net.linear("a", x, 8, bias=False, weight=w), 8, bias=False, weight=w))
    after = SmoothActivations(samples(mod))(mod)
    np.testing.assert_array_equal(weights_of(after)["shared.weight"], weights_of(mod)["shared.weight"])


def test_search_takes_the_strength_with_the_least_error():
    mod = norm_and_layer()
    given = samples(mod, 16)
    x = layer_norm(given["x"], weights_of(mod)["norm.weight"], weights_of(mod)["norm.bias"]).reshape(-1, WIDTH)

    def error(weights):
        """By brute force: rounded to 256 levels between the extremes, and to 255 for each output."""
        gamma = weights["norm.weight"] / weights_of(mod)["norm.weight"]
        xs, w = x * gamma, weights["fc.weight"].astype(np.float64)
        step = (max(xs.max(), 0) - min(xs.min(), 0)) / 255
        zero = np.rint(-min(xs.min(), 0) / step)
        xq = (np.clip(np.rint(xs / step) + zero, 0, 255) - zero) * step
        scale = np.abs(w).max(0) / 127
        return np.square(x @ weights_of(mod)["fc.weight"] - xq @ (np.rint(w / scale) * scale)).sum()

    found = error(weights_of(SmoothActivations(given, "search")(mod)))
    tried = [error(weights_of(SmoothActivations(given, a)(mod))) for a in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)]
    assert found == pytest.approx(min([*tried, error(weights_of(mod))]), rel=1e-3)


def test_the_record_says_so():
    mod = RecordLayers()(encoder())
    records = layers_of(SmoothActivations(samples(mod), 0.4)(mod))
    assert "input smoothed with strength 0.4: channels divided by" in records["q"].notes[-1]
    assert not any("smoothed" in note for note in records["down"].notes)


def test_errors():
    with pytest.raises(UsageError, match=r"strength 1\.5 of smoothing"):
        SmoothActivations({}, 1.5)
    with pytest.raises(ModelError, match="no array for input 'x'"):
        SmoothActivations({})(norm_and_layer())
