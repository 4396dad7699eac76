"""Finding the layers of a module: the calls that multiply activations by a weight.

Every pass that treats layers (prune, quantize, choose a kernel) sees them through ``find_layers``, and sees
every weight as *rows*: ``[N, taps, C]``, one row an output channel, where a 1x4 block is four neighbours along
the last axis. So no pass needs to know whether a layer is a convolution or a matrix product.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from tvm import relax
from tvm.ir import IRModule, Op

from pumice.module import weight_vars_of


@dataclass(frozen=True)
class Layer:
    """One layer: ``conv2d(data NCHW, weight OIHW)`` or ``matmul(data [..., K], weight [K, N])``."""

    name: str  # the weight's source name without its ``.weight``
    operator: str  # conv2d, linear
    var: relax.Var  # the call's result, before bias and activation
    call: relax.Call
    weight: relax.Var  # the parameter of main that holds the weight (int8 once quantized)
    weight_scale: relax.Expr | None  # the scale it is dequantized by, None while it is float

    @property
    def data(self) -> relax.Expr:
        """The activation that the layer reads."""
        return self.call.args[0]

    @property
    def channel_axis(self) -> int:
        """The axis of the weight that runs over output channels."""
        return 0 if self.operator == "conv2d" else 1

    @property
    def macs(self) -> int:
        """Multiply-adds of one inference, counted as if dense."""
        shape = [int(d) for d in self.weight.ty.shape]
        out = [int(d) for d in self.var.ty.shape]
        per_output = int(np.prod(shape[1:])) if self.operator == "conv2d" else shape[0]
        return int(np.prod(out)) * per_output

    def to_rows(self, weight: np.ndarray) -> np.ndarray:
        """The weight as ``[N, taps, C]``: ``taps`` runs over kernel positions, ``C`` over input channels."""
        if self.operator == "linear":
            return weight.T[:, None, :]
        n, c = weight.shape[:2]
        return weight.reshape(n, c, -1).transpose(0, 2, 1)

    def from_rows(self, rows: np.ndarray) -> np.ndarray:
        """The inverse of ``to_rows``."""
        if self.operator == "linear":
            return np.ascontiguousarray(rows[:, 0, :].T)
        shape = [int(d) for d in self.weight.ty.shape]
        return np.ascontiguousarray(rows.transpose(0, 2, 1)).reshape(shape)


def find_layers(mod: IRModule) -> list[Layer]:
    """The layers of ``main`` in execution order; two layers that share a weight get ``name`` and ``name#2``."""
    weights = set(weight_vars_of(mod))
    bound: dict[relax.Var, relax.Expr] = {}
    seen: Counter[str] = Counter()
    layers = []
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            bound[binding.var] = binding.value
            operator = _layer_operator(binding.value)
            if operator is None:
                continue
            weight, scale = _resolve_weight(binding.value.args[1], bound)
            if weight not in weights:
                continue
            if operator == "linear" and len(weight.ty.shape) != 2:
                continue
            name = weight.name.removesuffix(".weight")
            seen[name] += 1
            unique = name if seen[name] == 1 else f"{name}#{seen[name]}"
            layers.append(Layer(unique, operator, binding.var, binding.value, weight, scale))
    return layers


def _layer_operator(value: relax.Expr) -> str | None:
    if not (isinstance(value, relax.Call) and isinstance(value.op, Op)):
        return None
    if value.op.name == "relax.matmul":
        return "linear"
    if value.op.name == "relax.nn.conv2d":
        attrs = value.attrs
        return "conv2d" if (attrs.data_layout, attrs.kernel_layout) == ("NCHW", "OIHW") else None
    return None


def _resolve_weight(expr: relax.Expr, bound: dict[relax.Var, relax.Expr]) -> tuple[relax.Expr, relax.Expr | None]:
    """The parameter behind a layer's second operand, through at most one dequantize."""
    value = bound.get(expr) if isinstance(expr, relax.Var) else None
    if isinstance(value, relax.Call) and isinstance(value.op, Op) and value.op.name == "relax.dequantize":
        return value.args[0], value.args[1]
    return expr, None
