"""Recognising a layer's activation function by its values, however a model spells it.

multiply(y, sigmoid(y))   is SiLU;   divide(multiply(y, clip(add(y, 3), 0, 6)), 6)   is hard swish
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tvm import relax

from pumice.passes.elementwise_numpy import ELEMENTWISE, apply
from pumice.passes.rewriting import shape_of

if TYPE_CHECKING:
    from pumice.passes.fusion import Graph


@dataclass(frozen=True)
class Activation:
    """``name`` is one of the ACTIVATIONS that have a kernel; ``members`` compute it, the last one is its result."""

    name: str
    parameters: tuple[float, ...]
    members: tuple[relax.Var, ...]


def activation_after(graph: Graph, var: relax.Var) -> Activation | None:
    """The activation function that alone reads ``var``, None if there is none that an epilogue computes."""
    flow = graph.flow
    values = {var: _POINTS}
    while len(values) <= _MOST_MEMBERS:
        readers = {user for member in values for user in flow.users[member] if user not in values}
        if not readers or any(member in flow.outputs for member in values):
            return None
        reader = min(readers, key=flow.order.__getitem__)
        value = _value(graph, reader, values)
        if value is None:
            return None
        values[reader] = value
        if readers == {reader}:  # nothing else reads what came before
            known = _recognised(value)
            if known is not None:
                return Activation(*known, tuple(values)[1:])
    return None


def _value(graph: Graph, reader: relax.Var, values: dict[relax.Var, np.ndarray]) -> np.ndarray | None:
    call = graph.flow.value[reader]
    if graph.flow.op(reader) not in ELEMENTWISE or shape_of(reader) != shape_of(next(iter(values))):
        return None
    operands = []
    for argument in call.args:
        number = graph.number(argument)
        if number is None and argument not in values:
            return None
        operands.append(np.asarray(values[argument] if number is None else number, np.float64))
    with np.errstate(all="ignore"):
        return apply(call, reader, operands)


def _recognised(values: np.ndarray) -> tuple[str, tuple[float, ...]] | None:
    for name, wanted in _WANTED.items():
        if _close(values, wanted):
            return name, ()
    slope = float(values[0] / _POINTS[0])
    is_leaky = slope not in (0.0, 1.0) and _close(values, np.where(_POINTS < 0, slope * _POINTS, _POINTS))
    return ("nn.leakyrelu", (slope,)) if is_leaky else None


def _close(values: np.ndarray, wanted: np.ndarray) -> bool:
    return np.allclose(values, wanted, rtol=1e-5, atol=1e-6)


_MOST_MEMBERS = 8
_POINTS = np.concatenate([np.linspace(-12, 12, 193), [-80.0, -30.0, 30.0, 80.0]])
_HALF = 0.5 * _POINTS
_WANTED = {
    "tanh": np.tanh(_POINTS),
    "sigmoid": 1 / (1 + np.exp(-_POINTS)),
    "hard_sigmoid": np.clip(_POINTS / 6 + 0.5, 0, 1),
    "hard_swish": _POINTS * np.clip(_POINTS / 6 + 0.5, 0, 1),
    "nn.silu": _POINTS / (1 + np.exp(-_POINTS)),
    "nn.gelu": _HALF * (1 + np.array([math.erf(x) for x in _POINTS / math.sqrt(2)])),
    "nn.gelu_tanh": _HALF * (1 + np.tanh(math.sqrt(2 / math.pi) * (_POINTS + 0.044715 * _POINTS**3))),
}
