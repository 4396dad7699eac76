"""Small networks in which channels are coupled in every way that ``channel_groups`` follows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from network import Network, residual_network
from tvm import relax, tirx
from tvm.ir import IRModule
from tvm.relax import op as R


def _weight(net: Network, name: str, *shape: int) -> relax.Var:
    return net.weight(name, net.rng.normal(0, 1, shape).astype(np.float32))


def mobile() -> IRModule:
    """Two inverted residual blocks with ``clip``, a depthwise layer that doubles its channels, batch norm left over."""
    net = Network()
    x = net.input("image", (1, 3, 8, 8))
    x = net.call("stem.clip", R.clip(net.conv("stem", x, 8, 3, padding=1), 0, 6))
    for name in ("a", "b"):
        y = net.call(f"{name}.clip", R.clip(net.conv(f"{name}.up", x, 16), 0, 6))
        y = net.relu(f"{name}.relu", net.conv(f"{name}.dw", y, 16, 3, padding=1, groups=16))
        x = net.add(f"{name}.add", net.conv(f"{name}.down", y, 8), x)
    x = net.call("scaled", R.multiply(x, _weight(net, "norm.weight", 1, 8, 1, 1)))
    x = net.call("shifted", R.add(x, _weight(net, "norm.bias", 1, 8, 1, 1)))
    x = net.conv("double", net.relu("relu", x), 16, 3, padding=1, groups=8)
    x = net.call("mean", R.mean(x, [2, 3]))
    return net.finish(logits=net.linear("fc", x, 10))


def concats() -> IRModule:
    """A dense block, whose concat is read by a grouped convolution too, and a flatten in front of a linear layer."""
    net = Network()
    x = net.input("image", (1, 4, 6, 6))
    a = net.relu("a.relu", net.conv("a", x, 8))
    b = net.relu("b.relu", net.conv("b", a, 16, 3, padding=1))
    both = net.call("both", R.concat([a, b], 1))
    c = net.relu("c.relu", net.conv("c", both, 12))
    d = net.relu("d.relu", net.conv("d", both, 12, groups=3))
    x = net.call("pool", R.nn.avg_pool2d(net.add("sum", c, d), (2, 2), (2, 2)))
    x = net.call("flat", R.reshape(x, (1, 108)))
    x = net.relu("fc1.relu", net.linear("fc1", x, 20))
    return net.finish(logits=net.linear("fc2", x, 10))


def grouped() -> IRModule:
    """A ShuffleNet-like unit: grouped convolutions around a shuffle of the channels."""
    net = Network()
    x = net.input("image", (1, 4, 6, 6))
    x = net.relu("stem.relu", net.conv("stem", x, 16))
    y = net.relu("g1.relu", net.conv("g1", x, 24, groups=4))
    y = net.call("split", R.reshape(y, (1, 4, 6, 6, 6)))
    y = net.call("turned", R.permute_dims(y, [0, 2, 1, 3, 4]))
    y = net.call("shuffled", R.reshape(y, (1, 24, 6, 6)))
    y = net.conv("dw", y, 24, 3, padding=1, groups=24)
    x = net.add("sum", net.conv("g2", y, 16, groups=4), x)
    x = net.conv("last", net.relu("relu", x), 12)
    return net.finish(y=net.conv("end", net.call("pool", R.nn.max_pool2d(x, (2, 2), (2, 2))), 2, 3))


def shuffled() -> IRModule:
    """A shuffle between convolutions that are not in groups."""
    net = Network()
    y = net.relu("wide.relu", net.conv("wide", net.input("image", (1, 4, 6, 6)), 24))
    y = net.call("split", R.reshape(y, (1, 2, 12, 6, 6)))
    y = net.call("turned", R.permute_dims(y, [0, 2, 1, 3, 4]))
    y = net.call("joined", R.reshape(y, (1, 24, 6, 6)))
    y = net.call("mean", R.mean(net.relu("next.relu", net.conv("next", y, 16)), [2, 3]))
    return net.finish(y=net.linear("out", y, 6))


def gates() -> IRModule:
    """A gated linear unit, a squeeze-and-excite gate, slices that go different ways, one weight for two layers."""
    net = Network()
    x = net.input("image", (1, 4, 6, 6))
    x = net.conv("both", x, 16)
    halves = net.call("halves", R.split(x, 2, 1))
    left, right = (net.call(f"half{i}", relax.TupleGetItem(halves, i)) for i in range(2))
    x = net.call("glu", R.multiply(left, net.call("gate", R.sigmoid(right))))
    pooled = net.call("pooled", R.mean(x, [2, 3], keepdims=True))
    squeezed = net.relu("squeeze.relu", net.conv("squeeze", pooled, 4))
    excited = net.call("excited", R.sigmoid(net.conv("excite", squeezed, 8)))
    x = net.call("se", R.multiply(x, excited))
    first = net.call("first", R.strided_slice(x, [1], [0], [4]))
    second = net.call("second", R.strided_slice(x, [1], [4], [8]))
    second = net.call("tanh", R.tanh(second))
    x = net.call("joined", R.concat([second, first], 1))
    shared = _weight(net, "shared.weight", 8, 8, 1, 1)
    x = net.relu("one.relu", net.conv("one", x, 8, weight=shared))
    x = net.relu("two.relu", net.conv("two", x, 8, weight=shared, bias=False))
    x = net.call("normed", R.nn.group_norm(x, _weight(net, "gn.weight", 8), _weight(net, "gn.bias", 8), 2, 1, [2, 3]))
    return net.finish(y=net.conv("last", x, 3))


def transformer() -> IRModule:
    """An embedding with positions, an encoder layer with four heads and one with a gate; the stream is the output."""
    net = Network()
    ids = net.input("ids", (1, 6), "int64")
    x = net.call("embedded", R.take(_weight(net, "table.weight", 20, 16), ids, 0, mode="clip"))
    x = net.call("placed", R.add(x, _weight(net, "positions", 1, 6, 16)))
    x = net.norm("norm0", x)
    x = net.norm("norm1", net.add("sum1", attention(net, "att", x, 4), x))
    y = net.call("gelu", R.nn.gelu(net.linear("up", x, 24)))
    x = net.norm("norm2", net.add("sum2", net.linear("down", y, 16), x))
    gate = net.call("silu", R.nn.silu(net.linear("gate", x, 24, bias=False)))
    y = net.call("gated", R.multiply(gate, net.linear("value", x, 24, bias=False)))
    x = net.add("sum3", net.linear("out", y, 16), x)
    x = net.call("rms", R.nn.rms_norm(x, _weight(net, "rms.weight", 16), [-1]))
    return net.finish(y=net.call("pooled", R.mean(x, [1])))


def attention(net: Network, name: str, x: relax.Var, heads: int) -> relax.Var:
    """Attention of ``x [B, T, C]`` over itself, in the form that ``FuseAttention`` gives."""
    batch, tokens, width = (int(size) for size in x.ty.shape)
    split = (batch, tokens, heads, width // heads)
    q, k, v = (
        net.call(f"{name}.{part}.heads", R.reshape(net.linear(f"{name}.{part}", x, width), split)) for part in "qkv"
    )
    scale = tirx.FloatImm("float32", 0.3)
    y = net.call(f"{name}.attention", R.nn.attention(q, k, v, scale=scale))
    return net.linear(f"{name}.out", net.call(f"{name}.joined", R.reshape(y, (batch, tokens, width))), width)


NETWORKS: dict[str, Callable[[], IRModule]] = {
    "residual": residual_network,
    "mobile": mobile,
    "concats": concats,
    "grouped": grouped,
    "shuffled": shuffled,
    "gates": gates,
    "transformer": transformer,
}
