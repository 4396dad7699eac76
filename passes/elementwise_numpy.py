"""Elementwise operators in numpy: what they make of float64 arrays."""

from __future__ import annotations

import math

import numpy as np
from tvm import relax

from pumice.passes.numpy_operators import evaluate


def apply(call: relax.Call, var: relax.Var, operands: list[np.ndarray]) -> np.ndarray | None:
    """The elementwise operator that computes ``var``, in float64 on numpy operands; None if it is not in the table."""
    own = _OWN.get(str(call.op.name).removeprefix("relax."))
    if own is not None:
        return np.asarray(own(*operands), np.float64)
    result = evaluate(call, var.ty, operands)
    return None if result is None or isinstance(result, tuple) else np.asarray(result, np.float64)


_erf = np.vectorize(math.erf)
_OWN = {
    "nn.relu": lambda x: np.maximum(x, 0),
    "nn.silu": lambda x: x / (1 + np.exp(-x)),
    "nn.gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "nn.gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "erf": lambda x: _erf(x),
}
ELEMENTWISE = frozenset(
    {
        *_OWN,
        *("add", "subtract", "multiply", "divide", "power", "maximum", "minimum", "negative", "abs", "exp", "log"),
        *("sqrt", "rsqrt", "square", "tanh", "sigmoid", "clip", "nn.leakyrelu"),
    }
)
