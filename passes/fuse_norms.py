"""Compiler passes that recognise layer norm and RMS norm where a model spells them out."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.passes.rewriting import Rewriter, is_tensor, op_name, rewrite, shape_of


@tvm.transform.module_pass(opt_level=0, name="pumice.FuseLayerNorm")
class FuseLayerNorm:
    """``(x - mean(x)) / sqrt(mean((x - mean(x))^2) + e) * gamma + beta -> nn.layer_norm(x, gamma, beta)``.

    Over the last axis, with gamma and beta of shape [C]; the square as ``power`` or as a product, the root as
    ``divide`` by ``sqrt`` or as ``multiply`` by ``rsqrt``.
    """

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Fuse every layer norm."""
        return rewrite(mod, _fuse_layer_norm)


@tvm.transform.module_pass(opt_level=0, name="pumice.FuseRMSNorm")
class FuseRMSNorm:
    """``x / sqrt(mean(x^2) + e) * gamma -> nn.rms_norm(x, gamma)`` over the last axis."""

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Fuse every RMS norm."""
        return rewrite(mod, _fuse_rms_norm)


def _fuse_layer_norm(rw: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
    if op_name(value) != "relax.add" or not is_tensor(var):
        return None
    for scaled, beta in (value.args, value.args[::-1]):
        product = rw.call(scaled, "multiply")
        if product is None or not _is_vector(rw, beta, var):
            continue
        for quotient, gamma in (product.args, product.args[::-1]):
            normalized = _over_root(rw, quotient) if _is_vector(rw, gamma, var) else None
            if normalized is None:
                continue
            centered = rw.call(normalized.data, "subtract")
            if centered is None or normalized.data.same_as(centered.args[0]):
                continue
            data = centered.args[0]
            if _is_mean_of(rw, centered.args[1], data):
                return relax.op.nn.layer_norm(data, gamma, beta, axes=[-1], epsilon=normalized.epsilon)
    return None


def _fuse_rms_norm(rw: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
    if op_name(value) != "relax.multiply" or not is_tensor(var):
        return None
    for quotient, gamma in (value.args, value.args[::-1]):
        normalized = _over_root(rw, quotient) if _is_vector(rw, gamma, var) else None
        if normalized is not None and shape_of(normalized.data) == shape_of(var):
            return relax.op.nn.rms_norm(normalized.data, gamma, axes=[-1], epsilon=normalized.epsilon)
    return None


@dataclass(frozen=True)
class _Normalized:
    data: relax.Expr
    epsilon: float


def _over_root(rw: Rewriter, expr: relax.Expr) -> _Normalized | None:
    """Match ``d / sqrt(mean(d^2) + e)``, however it is written."""
    quotient = rw.call(expr, "divide")
    if quotient is not None:
        root = rw.call(quotient.args[1], "sqrt")
        pairs = [] if root is None else [(quotient.args[0], root.args[0])]
    else:
        product = rw.call(expr, "multiply")
        orders = [] if product is None else [product.args, product.args[::-1]]
        roots = [(data, rw.call(factor, "rsqrt")) for data, factor in orders]
        pairs = [(data, root.args[0]) for data, root in roots if root is not None]
    for data, radicand in pairs:
        total = rw.call(radicand, "add")
        if total is None:
            continue
        for mean, epsilon in (total.args, total.args[::-1]):
            value = rw.scalar(epsilon)
            if value is not None and _is_mean_of_square(rw, mean, data):
                return _Normalized(data, value)
    return None


def _is_mean_of_square(rw: Rewriter, expr: relax.Expr, data: relax.Expr) -> bool:
    mean = rw.call(expr, "mean")
    if mean is None or not _is_over_last_axis(mean):
        return False
    power = rw.call(mean.args[0], "power", "multiply", "square")
    if power is None or not power.args[0].same_as(data):
        return False
    operator = op_name(power)
    if operator == "relax.power":
        return rw.scalar(power.args[1]) == 2
    return operator == "relax.square" or power.args[1].same_as(data)


def _is_mean_of(rw: Rewriter, expr: relax.Expr, data: relax.Expr) -> bool:
    mean = rw.call(expr, "mean")
    return mean is not None and _is_over_last_axis(mean) and mean.args[0].same_as(data)


def _is_over_last_axis(mean: relax.Call) -> bool:
    rank = len(shape_of(mean.args[0]))
    axes = None if mean.attrs.axis is None else [int(a) % rank for a in mean.attrs.axis]
    return axes == [rank - 1] and bool(mean.attrs.keepdims)


def _is_vector(rw: Rewriter, expr: relax.Expr, var: relax.Var) -> bool:
    """Whether the operand is one known number for each element of ``var``'s last axis."""
    return rw.array(expr) is not None and shape_of(expr) == shape_of(var)[-1:]
