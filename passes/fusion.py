"""What one packed kernel does: a layer with its bias, residual add, activation and requantization.

    conv2d(x, w) -> add(bias) -> [add(other)] -> [gelu ...] -> [relu | clip] -> [quantize]   ==>   one Fused

The chain is followed as far as each value has a single reader. In the quantized form the convolution's own
quantize -> dequantize before a residual add is dropped: the sum is then rounded once instead of twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from tvm import relax
from tvm.ir import IRModule

from pumice.module import weights_of
from pumice.passes.activations import activation_after
from pumice.passes.dataflow import Dataflow
from pumice.passes.layers import Layer, find_layers
from pumice.passes.numpy_operators import plain
from pumice.passes.rewriting import shape_of

RESHAPES = ("reshape", "squeeze", "expand_dims", "flatten")


@dataclass(frozen=True)
class Quant:
    """Affine uint8: ``value = (stored - zero_point) * scale``."""

    scale: float
    zero_point: int

    def store(self, value: float) -> int:
        """``value`` in stored units, saturated: 0..255."""
        return int(np.clip(np.rint(np.clip(value / self.scale, -1e6, 1e6)) + self.zero_point, 0, 255))


@dataclass(frozen=True)
class Fused:
    """One layer and what its kernel does besides. ``quant`` is the output's; None where it is float32."""

    layer: Layer
    input_quant: Quant | None  # None: the layer computes in float32
    result: relax.Var
    members: tuple[relax.Var, ...]  # every variable that the kernel makes superfluous, the result included
    bias: np.ndarray | None = None
    residual: relax.Var | None = None
    residual_quant: Quant | None = None  # of a residual that is read as bytes; None: as float32
    activation: str | None = None  # a name of schedules.functions.ACTIVATIONS
    parameters: tuple[float, ...] = ()  # of the activation
    low: float = float("-inf")
    high: float = float("inf")
    quant: Quant | None = None

    @property
    def is_complete(self) -> bool:
        """Whether a kernel exists for the chain so far: a residual is of the output's type."""
        return self.residual is None or (self.residual_quant is None) == (self.quant is None)

    @property
    def is_activated(self) -> bool:
        """Whether an activation or a clamp is in the chain."""
        return self.activation is not None or bool(np.isfinite(self.low) or np.isfinite(self.high))


class Graph:
    """``main`` with the values of its weights: what the lowering asks of it."""

    def __init__(self, mod: IRModule) -> None:
        self.flow = Dataflow(mod)
        self.layers = find_layers(mod)
        self._weights = weights_of(mod)

    def array(self, expr: relax.Expr) -> np.ndarray | None:
        """The value of a weight or constant, None for what is computed."""
        if isinstance(expr, relax.Var):
            return self._weights.get(expr.name) if expr in self.flow.weights else None
        value = plain(expr)
        return value if isinstance(value, np.ndarray) else None

    def is_weight(self, name: str) -> bool:
        """Whether the model has a weight of this name."""
        return name in self._weights

    def quant(self, call: relax.Call) -> Quant | None:
        """The parameters of a per-tensor 8-bit quantize or dequantize, moved to uint8; None for any other."""
        scale, zero_point = self.array(call.args[1]), self.array(call.args[2])
        dtype = str(call.ty.dtype) if self.name(call) == "quantize" else str(call.args[0].ty.dtype)
        if scale is None or zero_point is None or scale.size != 1 or zero_point.size != 1:
            return None
        if dtype not in ("uint8", "int8"):
            return None
        return Quant(float(scale.ravel()[0]), int(zero_point.ravel()[0]) + (128 if dtype == "int8" else 0))

    def dequantized(self, var: relax.Expr) -> Quant | None:
        """The parameters by which ``var`` was dequantized, if that is what computed it."""
        if self.flow.op(var) != "dequantize" or self.flow.value[var].args[0] not in self.flow.activations:
            return None
        return self.quant(self.flow.value[var])

    def next_quant(self, var: relax.Var) -> Quant | None:
        """The quantize that alone reads ``var``, possibly behind reshapes: its parameters."""
        user = self.flow.only_user(var)
        while user is not None and self.flow.op(user) in RESHAPES:
            user = self.flow.only_user(user)
        return self.quant(self.flow.value[user]) if user is not None and self.flow.op(user) == "quantize" else None

    def clamp(self, var: relax.Var, low: float, high: float) -> tuple[float, float] | None:
        """The bounds of a value that was clamped to ``[low, high]`` after the ReLU or clip that makes ``var``."""
        if self.flow.op(var) == "nn.relu":
            return max(low, 0.0), max(high, 0.0)
        if self.flow.op(var) == "clip":
            below, above = (float(plain(bound)) for bound in self.flow.value[var].args[1:3])
            return max(low, below), min(max(high, below), above)
        return None

    def number(self, expr: relax.Expr) -> float | None:
        """The value of an operand that is one number known now; None for any other."""
        if expr in self.flow.activations:
            return None
        value = self.array(expr)
        value = np.asarray(plain(expr)) if value is None and not isinstance(expr, relax.Var) else value
        return float(value.ravel()[0]) if value is not None and value.dtype != object and value.size == 1 else None

    @staticmethod
    def name(call: relax.Call) -> str:
        """The operator's name without ``relax.``."""
        return str(call.op.name).removeprefix("relax.")

    def weight_zero_point(self, layer: Layer) -> np.ndarray | None:
        """The zero points that the layer's weight is dequantized with."""
        return self.array(self.flow.value[layer.call.args[1]].args[2])


def fuse(graph: Graph) -> list[Fused]:
    """The chains of all layers; no variable is in two of them."""
    taken: set[relax.Var] = set()
    chains = []
    for layer in graph.layers:
        chain = _follow(graph, layer, taken)
        taken.update(chain.members)
        chains.append(chain)
    return chains


def _follow(graph: Graph, layer: Layer, taken: set[relax.Var]) -> Fused:
    flow = graph.flow
    is_int8 = layer.weight_scale is not None
    chain = Fused(layer, graph.dequantized(layer.data) if is_int8 else None, layer.var, (layer.var,))
    biased = flow.biased(layer.var)
    if biased is not layer.var:
        bias = _bias(graph, layer, biased)
        if bias is None:
            return chain
        chain = _grow(chain, biased, bias=bias)
    best = chain
    while (longer := _step(graph, chain, taken)) is not None:
        chain = longer
        best = chain if chain.is_complete else best
    return best


def _step(graph: Graph, chain: Fused, taken: set[relax.Var]) -> Fused | None:
    """``chain`` with the reader of its result, or None where it ends."""
    flow = graph.flow
    if chain.quant is None and not chain.is_activated:
        found = activation_after(graph, chain.result)
        if found is not None and taken.isdisjoint(found.members):
            members = (*chain.members, *found.members)
            chain = replace(chain, activation=found.name, parameters=found.parameters)
            return replace(chain, result=members[-1], members=members)
    user = flow.only_user(chain.result)
    if user is None or user in taken:
        return None
    if chain.quant is not None:
        return _through_rounding(graph, chain, user, taken)
    call, operator = flow.value[user], flow.op(user)
    clamp = graph.clamp(user, chain.low, chain.high)
    if clamp is not None:
        return _grow(chain, user, low=clamp[0], high=clamp[1])
    if operator == "quantize" and chain.input_quant is not None:
        quant = graph.quant(call)
        is_float_sum = chain.residual is not None and chain.residual_quant is None
        return None if quant is None or is_float_sum else _grow(chain, user, quant=quant)
    if operator == "add":
        return _add_residual(graph, chain, user, chain.result)
    return None


def _through_rounding(graph: Graph, chain: Fused, user: relax.Var, taken: set[relax.Var]) -> Fused | None:
    """quantize -> dequantize -> add: the add happens in the accumulator's precision instead."""
    if graph.flow.op(user) != "dequantize":
        return None
    total = graph.flow.only_user(user)
    if total is None or total in taken or graph.flow.op(total) != "add":
        return None
    unrounded = replace(_grow(chain, user), quant=None)
    summed = _add_residual(graph, unrounded, total, user)
    # What is added as floats is another layer's result: that one takes these bytes along.
    return None if summed is None or summed.residual_quant is None else summed


def _add_residual(graph: Graph, chain: Fused, total: relax.Var, mine: relax.Var) -> Fused | None:
    operands = list(graph.flow.value[total].args)
    others = [operand for operand in operands if not operand.same_as(mine)]
    if chain.residual is not None or chain.is_activated or len(others) != 1 or others[0] not in graph.flow.activations:
        return None
    other = others[0]
    if shape_of(other) != shape_of(total) or shape_of(mine) != shape_of(total):
        return None
    quant = graph.dequantized(other) if chain.input_quant is not None else None
    return _grow(chain, total, residual=other, residual_quant=quant)


def _grow(chain: Fused, user: relax.Var, **changes: object) -> Fused:
    return replace(chain, result=user, members=(*chain.members, user), **changes)  # type: ignore[arg-type]


def _bias(graph: Graph, layer: Layer, biased: relax.Var) -> np.ndarray | None:
    """float32 ``[N]``, or None where what is added is not one number a channel."""
    others = [operand for operand in graph.flow.value[biased].args if not operand.same_as(layer.var)]
    value = graph.array(others[0]) if len(others) == 1 else None
    if value is None:
        return None
    axis = 1 if layer.operator == "conv2d" else len(shape_of(layer.var)) - 1
    channels = shape_of(layer.var)[axis]
    shape = [1] * (len(shape_of(layer.var)) - value.ndim) + list(value.shape)
    if any(extent != 1 for i, extent in enumerate(shape) if i != axis):
        return None
    return np.broadcast_to(value.astype(np.float32).ravel(), (channels,))
