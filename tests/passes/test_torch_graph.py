"""Every rule against TVM, the whole against the evaluator, gradients against differences."""

import numpy as np
import pytest
from network import Network, residual_network
from running import run_module
from token_encoder import TOKENS, padded_texts, token_encoder
from tvm import relax
from tvm.relax import op as R

from pumice.errors import UnsupportedError
from pumice.module import inputs_of, weights_of
from pumice.passes import Calibrate, Quantize
from pumice.passes.calibrate import Samples
from pumice.passes.dataflow import Dataflow
from pumice.passes.evaluate import Evaluator

torch = pytest.importorskip("torch")

from pumice.passes.torch_graph import TorchGraph, stacked, tensors_of  # noqa: E402

RNG = np.random.default_rng(0)
MAP, ROW = (2, 6, 7, 9), (3, 5, 8)


def c(value, dtype="float32"):
    return relax.const(np.asarray(value, dtype), dtype)


def normal(*shape):
    return c(RNG.normal(0, 1, shape))


def there_and_back(x, scale, zero_point, dtype):
    return R.dequantize(R.quantize(x, scale, zero_point, axis=1, out_dtype=dtype), scale, zero_point, axis=1)


# name -> (shapes of the inputs, what is computed of them)
CASES = {
    "conv": ([MAP], lambda x: R.nn.conv2d(x, normal(8, 6, 3, 3), padding=1)),
    "conv odd padding": ([MAP], lambda x: R.nn.conv2d(x, normal(8, 3, 3, 2), (2, 1), (1, 0, 2, 1), (1, 2), 2)),
    "depthwise": ([MAP], lambda x: R.nn.conv2d(x, normal(6, 1, 3, 3), padding=1, groups=6)),
    "matmul": ([ROW, (3, 8, 4)], R.matmul),
    "attention": ([(2, 5, 3, 4)] * 3, lambda q, k, v: R.nn.attention(q, k, v, scale=0.3)),
    "attention, bias": ([(2, 5, 3, 4)] * 3 + [(2, 1, 1, 5)], lambda q, k, v, b: R.nn.attention(q, k, v, b)),
    "attention, causal": ([(2, 5, 3, 4)] * 3, lambda q, k, v: R.nn.attention(q, k, v, causal_mask="TopLeft")),
    "attention, causal to the end": (
        [(2, 3, 3, 4), (2, 5, 3, 4), (2, 5, 3, 4)],
        lambda q, k, v: R.nn.attention(q, k, v, causal_mask="BottomRight"),
    ),
    "layer norm": ([ROW], lambda x: R.nn.layer_norm(x, normal(8), normal(8), [-1], 1e-3)),
    "layer norm over two axes": ([ROW], lambda x: R.nn.layer_norm(x, normal(5, 8), normal(5, 8), [1, 2])),
    "layer norm inside": ([ROW], lambda x: R.nn.layer_norm(x, normal(5), normal(5), [1])),
    "rms norm": ([ROW], lambda x: R.nn.rms_norm(x, normal(8), [-1], 1e-3)),
    "group norm": ([MAP], lambda x: R.nn.group_norm(x, normal(6), normal(6), 3, 1, [2, 3])),
    "softmax": ([ROW], lambda x: R.nn.softmax(x, 1)),
    "max pool": ([MAP], lambda x: R.nn.max_pool2d(x, (3, 2), (2, 2), (1, 0, 1, 1))),
    "max pool, ceil": ([MAP], lambda x: R.nn.max_pool2d(x, (3, 3), (2, 3), ceil_mode=True)),
    "max pool, dilated": ([MAP], lambda x: R.nn.max_pool2d(x, (2, 2), (1, 1), dilation=(2, 2))),
    "average pool": ([MAP], lambda x: R.nn.avg_pool2d(x, (3, 2), (2, 2), (1, 0, 1, 1))),
    "average pool with padding": ([MAP], lambda x: R.nn.avg_pool2d(x, (3, 3), (2, 2), 1, count_include_pad=True)),
    "average pool, ceil": ([MAP], lambda x: R.nn.avg_pool2d(x, (3, 3), (2, 3), ceil_mode=True)),
    "adaptive pool": ([MAP], lambda x: R.nn.adaptive_avg_pool2d(x, (3, 2))),
    "pad": ([MAP], lambda x: R.nn.pad(x, [0, 0, 1, 0, 2, 1, 0, 3], pad_value=1.5)),
    "relu": ([ROW], R.nn.relu),
    "clip": ([ROW], lambda x: R.clip(x, -0.5, 1.0)),
    "gelu": ([ROW], R.nn.gelu),
    "gelu tanh": ([ROW], R.nn.gelu_tanh),
    "silu": ([ROW], R.nn.silu),
    "leaky relu": ([ROW], lambda x: R.nn.leakyrelu(x, 0.2)),
    "prelu": ([MAP], lambda x: R.nn.prelu(x, normal(6), 1)),
    "softplus": ([ROW], R.nn.softplus),
    "sigmoid": ([ROW], R.sigmoid),
    "tanh": ([ROW], R.tanh),
    "exp": ([ROW], R.exp),
    "erf": ([ROW], R.erf),
    "square": ([ROW], R.square),
    "sqrt": ([ROW], lambda x: R.sqrt(R.abs(x))),
    "rsqrt": ([ROW], lambda x: R.rsqrt(R.abs(x))),
    "negative": ([ROW], R.negative),
    "round": ([ROW], R.round),
    "add": ([ROW, (8,)], R.add),
    "subtract": ([ROW, (5, 1)], R.subtract),
    "multiply": ([ROW, ()], R.multiply),
    "divide": ([ROW, ROW], R.divide),
    "power": ([ROW], lambda x: R.power(R.abs(x), c(1.5))),
    "maximum": ([ROW, ROW], R.maximum),
    "minimum": ([ROW, ROW], R.minimum),
    "where": ([ROW, ROW], lambda a, b: R.where(R.less(a, b), a, R.multiply(b, c(2)))),
    "compare": ([ROW, ROW], lambda a, b: R.astype(R.greater_equal(a, b), "float32")),
    "logic": (
        [ROW, ROW],
        lambda a, b: R.astype(R.logical_and(R.less(a, c(0)), R.logical_not(R.equal(a, b))), "float32"),
    ),
    "integer division": ([ROW], lambda x: R.divide(R.astype(R.multiply(x, c(9)), "int32"), c(4, "int32"))),
    "sum": ([MAP], lambda x: R.sum(x, [1, 3], keepdims=True)),
    "mean": ([MAP], lambda x: R.mean(x, [2, 3])),
    "mean of all": ([MAP], R.mean),
    "max": ([MAP], lambda x: R.max(x, [1])),
    "min": ([MAP], lambda x: R.min(x, [-1], keepdims=True)),
    "variance": ([MAP], lambda x: R.variance(x, [1])),
    "reshape": ([MAP], lambda x: R.reshape(x, (2, 3, 2, 63))),
    "permute": ([MAP], lambda x: R.permute_dims(x, [0, 2, 3, 1])),
    "reverse": ([ROW], R.permute_dims),
    "expand": ([ROW], lambda x: R.expand_dims(x, [1, -1])),
    "squeeze": ([(3, 1, 8, 1)], lambda x: R.squeeze(x, [1, -1])),
    "broadcast": ([(3, 1, 8)], lambda x: R.broadcast_to(x, (2, 3, 5, 8))),
    "concat": ([ROW, (3, 2, 8)], lambda a, b: R.concat([a, b], 1)),
    "stack": ([ROW, ROW], lambda a, b: R.stack([a, b], 1)),
    "split": ([ROW], lambda x: R.split(x, 3, 2)[2]),
    "split at": ([ROW], lambda x: R.split(x, [2, 3], 1)[1]),
    "slice": ([MAP], lambda x: R.strided_slice(x, [1, 3], [1, -2], [6, 0], [2, -3])),
    "flip": ([MAP], lambda x: R.flip(x, 2)),
    "take": ([ROW], lambda x: R.take(x, c([[0, 4], [2, 2]], "int64"), 1)),
    "take, wrapped": ([ROW], lambda x: R.take(x, c([-1, 7, 3], "int64"), 1, mode="wrap")),
    "take, clipped": ([ROW], lambda x: R.take(x, c([9, 0], "int64"), 0, mode="clip")),
    "quantize": ([ROW], lambda x: there_and_back(x, c(0.02), c(100, "uint8"), "uint8")),
    "quantize by channel": ([ROW], lambda x: there_and_back(x, c(np.arange(1, 6) / 9), c(np.zeros(5), "int8"), "int8")),
}


def module(shapes, compute):
    net = Network()
    variables = [net.input(f"x{i}", shape) for i, shape in enumerate(shapes)]
    value = compute(*variables)
    return net.finish(y=flattened(net, value))


def flattened(net, value):
    """A nested expression as bindings."""
    if isinstance(value, relax.Call):
        value = relax.Call(value.op, [flattened(net, arg) for arg in value.args], value.attrs, value.ty_args)
        return net.call(f"v{len(net.bindings)}", value)
    if isinstance(value, relax.TupleGetItem):
        return net.call(f"v{len(net.bindings)}", relax.TupleGetItem(flattened(net, value.tuple_value), value.index))
    return value


@pytest.mark.parametrize("name", CASES)
def test_a_rule_means_what_tvm_means(name):
    """For three samples at once."""
    mod = module(*CASES[name])
    rng = np.random.default_rng(1)
    samples = [
        {var.name: rng.normal(0, 1, [int(d) for d in var.ty.shape]).astype(np.float32) for var in inputs_of(mod)}
        for _ in range(3)
    ]
    (found,) = TorchGraph.of(mod)(stacked(mod, samples), {})
    expected = [run_module(mod, sample)[0] for sample in samples]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_network_gives_what_the_evaluator_gives(quantized):
    mod = residual_network()
    arrays = {"image": np.random.default_rng(2).normal(0, 1, (6, 4, 12, 12)).astype(np.float32)}
    if quantized:
        mod = Quantize()(Calibrate(arrays)(mod))
    expected = np.stack([Evaluator(mod).run(sample)["logits"] for sample in Samples(mod, arrays)])
    (found,) = TorchGraph.of(mod)(stacked(mod, Samples(mod, arrays)), tensors_of(mod))
    # A sum of floats in another order may round a tie the other way.
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=0.1 if quantized else 1e-4)


def test_an_encoder_gives_what_the_evaluator_gives_and_is_shorter_on_demand():
    mod = token_encoder()
    arrays = padded_texts(9)
    evaluator = Evaluator(mod)
    expected = np.stack([evaluator.run(sample)["y"] for sample in Samples(mod, arrays)])
    values = stacked(mod, Samples(mod, arrays))
    graph = TorchGraph.of(mod)
    (found,) = graph(values, tensors_of(mod))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    short = [i for i, count in enumerate(arrays["attention_mask"].sum(1)) if count <= 7]
    (found,) = graph([value[short, :, :7] for value in values], tensors_of(mod), lengths={TOKENS: 7})
    np.testing.assert_allclose(found.numpy(), expected[short], rtol=1e-4, atol=1e-5)


def test_gradients_are_differences():
    mod = residual_network()
    weights = {name: value.double() for name, value in tensors_of(mod).items()}
    x = torch.randn(2, 1, 4, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = TorchGraph.of(mod)

    def loss(bias, weight):
        return graph([x], {**weights, "a1.bias": bias, "b2.weight": weight})[0].square().sum()

    given = [weights[name].requires_grad_() for name in ("a1.bias", "b2.weight")]
    loss(*given).backward()
    for i, tensor in enumerate(given):
        step = torch.zeros_like(tensor)
        step.view(-1)[5] = 1e-5
        ends = [loss(*[t.detach() + s * step if j == i else t.detach() for j, t in enumerate(given)]) for s in (1, -1)]
        difference = float(ends[0] - ends[1]) / 2e-5
        assert float(tensor.grad.view(-1)[5]) == pytest.approx(difference, rel=1e-4)


def test_gradients_pass_rounding_within_its_range():
    net = Network()
    x = net.input("x", (4,))
    q = net.call("q", R.quantize(x, c(0.5), c(3, "uint8"), out_dtype="uint8"))
    mod = net.finish(y=net.call("y", R.dequantize(q, c(0.5), c(3, "uint8"))))
    value = torch.tensor([[0.3, 0.8, -9.0, 900.0]], requires_grad=True)
    (y,) = TorchGraph.of(mod)([value], {})
    y.sum().backward()
    np.testing.assert_array_equal(y.detach().numpy(), [[0.5, 1.0, -1.5, 126.0]])
    np.testing.assert_array_equal(value.grad.numpy(), [[1, 1, 0, 0]])


def test_a_piece_of_a_graph_and_what_its_layers_read():
    mod = residual_network()
    flow = Dataflow(mod)
    by_name = {var.name: var for var in flow.order}
    graph = TorchGraph(mod, flow.bindings, [by_name["pool"]], [by_name["a.relu"]])
    assert graph.weights == ["a1.weight", "a1.bias", "a2.weight", "a2.bias"]
    x = torch.randn(3, 1, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    (plain,) = graph([x], tensors_of(mod))
    (twice,) = graph([x], tensors_of(mod), {by_name["a1"]: lambda value: 2 * value})
    w = {name: torch.from_numpy(np.array(value)) for name, value in weights_of(mod).items()}
    conv = torch.nn.functional.conv2d
    for found, factor in ((plain, 1), (twice, 2)):
        inner = conv(factor * x[:, 0], w["a1.weight"], w["a1.bias"].reshape(-1), padding=1).relu()
        outer = conv(inner, w["a2.weight"], w["a2.bias"].reshape(-1), padding=1)
        np.testing.assert_allclose(found[:, 0], (outer + x[:, 0]).relu(), rtol=1e-4, atol=1e-4)


def test_an_operator_without_a_rule_is_named():
    net = Network()
    x = net.input("x", (3, 4))
    mod = net.finish(y=net.call("sorted", R.sort(x, 1)))
    with pytest.raises(UnsupportedError, match=r"network.onnx: sorted is computed by sort, which has no rule"):
        TorchGraph.of(mod)
