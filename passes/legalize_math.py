"""Legalizations of transcendental operators that LLVM can vectorize.

TVM's own call ``expf``, ``erff`` and ``tanhf`` of libm for one element at a time. These expand into polynomials
(topi's, after Cephes and Eigen; within a few units in the last place of float32), and so the loop becomes vectors.

    exp(x)   ==>  call_tir(fast_exp, x)
    gelu(x)  ==>  call_tir(0.5 * x * (1 + fast_erf(x / sqrt(2))), x)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import relax, te, topi

Legalization = Callable[[relax.BlockBuilder, relax.Call], relax.Expr]


def _unary(make: Callable[[Any], Any], name: str) -> Legalization:
    """Call the tensor expression on float32; anything else keeps TVM's legalization."""

    def legalize(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        if str(call.ty.dtype) != "float32":
            return call.op.get_attr("FLegalize")(builder, call)
        return builder.call_te(make, call.args[0], primfunc_name_hint=name)

    return legalize


def _map(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: te.compute(x.shape, lambda *i: function(x(*i)))


def _gelu(x: Any) -> Any:
    scaled = topi.multiply(x, math.sqrt(0.5))
    return topi.multiply(topi.multiply(x, 0.5), topi.add(topi.fast_erf(scaled), 1.0))


def _gelu_tanh(x: Any) -> Any:
    cubic = topi.multiply(topi.multiply(x, topi.multiply(x, x)), 0.044715)
    inner = topi.multiply(topi.add(x, cubic), math.sqrt(2 / math.pi))
    return topi.multiply(topi.multiply(x, 0.5), topi.add(topi.fast_tanh(inner), 1.0))


def _sigmoid(x: Any) -> Any:
    return topi.divide(1.0, topi.add(topi.fast_exp(topi.negative(x)), 1.0))


LEGALIZATIONS: dict[str, Legalization] = {
    "relax.exp": _unary(topi.fast_exp, "exp"),
    "relax.erf": _unary(topi.fast_erf, "erf"),
    "relax.tanh": _unary(topi.fast_tanh, "tanh"),
    "relax.sigmoid": _unary(_sigmoid, "sigmoid"),
    "relax.nn.silu": _unary(lambda x: topi.multiply(x, _sigmoid(x)), "silu"),
    "relax.nn.gelu": _unary(_gelu, "gelu"),
    "relax.nn.gelu_tanh": _unary(_gelu_tanh, "gelu_tanh"),
}
