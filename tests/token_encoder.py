"""A small sentence encoder in the canonical layer form: ids and a mask of padded texts to one vector."""

from __future__ import annotations

import numpy as np
from network import Network
from tvm import relax
from tvm.ir import IRModule
from tvm.relax import op as R

TOKENS, VOCABULARY = 12, 20


def token_encoder(width: int = 8, seed: int = 0) -> IRModule:
    """Two layers of two heads, as exporters write them; the mean over real tokens."""
    net = Network(seed)
    ids, mask = net.input("ids", (1, TOKENS), "int64"), net.input("attention_mask", (1, TOKENS), "int64")
    table = net.weight("table", net.rng.normal(0, 1, (VOCABULARY, width)).astype(np.float32))
    x = net.norm("embedded", net.call("looked_up", R.take(table, ids, axis=0)))
    real = net.call("real", R.astype(mask, "float32"))
    padding = net.call("padding", R.subtract(relax.const(1.0), net.call("row", R.expand_dims(real, [1, 2]))))
    bias = net.call("bias", R.multiply(padding, relax.const(-1e9)))
    for i in range(2):
        x = _attention(net, i, x, bias, width)
        up = net.call(f"gelu{i}", R.nn.gelu(net.linear(f"up{i}", x, 2 * width)))
        x = net.norm(f"last{i}", net.add(f"last_sum{i}", net.linear(f"down{i}", up, width), x))
    weight = net.call("weight", R.expand_dims(real, [2]))
    total = net.call("total", R.sum(net.call("weighted", R.multiply(x, weight)), [1]))
    return net.finish(y=net.call("mean", R.divide(total, net.call("count", R.sum(weight, [1])))))


def _attention(net: Network, i: int, x: relax.Var, bias: relax.Var, width: int) -> relax.Var:
    shape = (1, TOKENS, 2, width // 2)
    heads = [net.call(f"{part}{i}.heads", R.reshape(net.linear(f"{part}{i}", x, width), shape)) for part in "qkv"]
    found = net.call(f"attention{i}", R.nn.attention(*heads, bias=bias))
    y = net.linear(f"out{i}", net.call(f"joined{i}", R.reshape(found, (1, TOKENS, width))), width)
    return net.norm(f"norm{i}", net.add(f"sum{i}", y, x))


def padded_texts(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random texts of 1 to ``TOKENS`` tokens, padded with token 0."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, TOKENS + 1, count)
    mask = (np.arange(TOKENS) < lengths[:, None]).astype(np.int64)
    return {"ids": rng.integers(0, VOCABULARY, (count, TOKENS)) * mask, "attention_mask": mask}
