"""Small networks in the canonical layer form, built a layer at a time with seeded random weights."""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.ir import IRModule
from tvm.relax import op as R

from pumice.module import with_output_names, with_source, with_weights


class Network:
    """Each method adds an operator whose result has the given name, and returns its variable."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.inputs: list[relax.Var] = []
        self.weights: dict[relax.Var, np.ndarray] = {}
        self.bindings: list[relax.VarBinding] = []
        self._builder = relax.BlockBuilder()

    def input(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> relax.Var:
        self.inputs.append(relax.Var(name, relax.TensorType(shape, dtype)))
        return self.inputs[-1]

    def weight(self, name: str, value: np.ndarray) -> relax.Var:
        var = relax.Var(name, relax.TensorType(value.shape, str(value.dtype)))
        self.weights[var] = value
        return var

    def call(self, name: str, value: relax.Expr) -> relax.Var:
        value = self._builder.normalize(value)
        var = relax.DataflowVar(name, value.ty)
        self.bindings.append(relax.VarBinding(var, value))
        return var

    def conv(self, name, x, n, kernel=1, stride=1, padding=0, groups=1, bias=True, weight=None) -> relax.Var:
        shape = (n, int(x.ty.shape[1]) // groups, kernel, kernel)
        w = self.weight(f"{name}.weight", self._he(shape, np.prod(shape[1:]))) if weight is None else weight
        y = R.nn.conv2d(x, w, strides=stride, padding=padding, groups=groups)
        if not bias:
            return self.call(name, y)
        b = self.weight(f"{name}.bias", self.rng.normal(0, 0.1, (1, n, 1, 1)).astype(np.float32))
        return self.call(f"{name}.biased", R.add(self.call(name, y), b))

    def linear(self, name, x, n, bias=True, weight=None) -> relax.Var:
        k = int(x.ty.shape[-1])
        w = self.weight(f"{name}.weight", self._he((k, n), k)) if weight is None else weight
        y = self.call(name, R.matmul(x, w))
        if not bias:
            return y
        b = self.weight(f"{name}.bias", self.rng.normal(0, 0.1, n).astype(np.float32))
        return self.call(f"{name}.biased", R.add(y, b))

    def norm(self, name, x) -> relax.Var:
        n = int(x.ty.shape[-1])
        gamma = self.weight(f"{name}.weight", np.ones(n, np.float32))
        beta = self.weight(f"{name}.bias", np.zeros(n, np.float32))
        return self.call(name, R.nn.layer_norm(x, gamma, beta, axes=[-1]))

    def relu(self, name, x) -> relax.Var:
        return self.call(name, R.nn.relu(x))

    def add(self, name, a, b) -> relax.Var:
        return self.call(name, R.add(a, b))

    def finish(self, **outputs: relax.Var) -> IRModule:
        results = list(outputs.values())
        value = results[0] if len(results) == 1 else relax.Tuple(results)
        result = relax.Var("result", value.ty)
        block = relax.DataflowBlock([*self.bindings, relax.VarBinding(result, value)])
        func = relax.Function([*self.inputs, *self.weights], relax.SeqExpr([block], result), result.ty)
        mod = IRModule({"main": self._builder.normalize(func.with_attr("num_input", len(self.inputs)))})
        mod = with_weights(mod, {var.name: value for var, value in self.weights.items()})
        return with_source(with_output_names(mod, list(outputs)), "network.onnx")

    def _he(self, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
        return self.rng.normal(0, np.sqrt(2 / fan_in), shape).astype(np.float32)


def residual_network() -> IRModule:
    """A convolution, a residual block with and one without a shortcut convolution, a pool, a linear layer."""
    net = Network()
    x = net.input("image", (1, 4, 12, 12))
    x = net.relu("stem.relu", net.conv("stem", x, 16, 3, padding=1))
    x = net.call("pool", R.nn.max_pool2d(x, (2, 2), (2, 2)))
    y = net.relu("a1.relu", net.conv("a1", x, 16, 3, padding=1))
    y = net.conv("a2", y, 16, 3, padding=1)
    x = net.relu("a.relu", net.add("a.add", y, x))
    shortcut = net.conv("b0", x, 32, 1, stride=2)
    y = net.relu("b1.relu", net.conv("b1", x, 32, 3, stride=2, padding=1))
    y = net.conv("b2", y, 32, 3, padding=1)
    x = net.relu("b.relu", net.add("b.add", y, shortcut))
    x = net.call("mean", R.mean(x, [2, 3], keepdims=False))
    return net.finish(logits=net.linear("fc", x, 10))
