"""A compiler pass that recognises GELU where a model spells it out."""

from __future__ import annotations

import math
from collections import Counter

import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.passes.rewriting import Rewriter, is_tensor, op_name, rewrite

# Hendrycks, Gimpel: Gaussian Error Linear Units, arXiv:1606.08415.
_ERF = {"x": 1 / math.sqrt(2)}
_TANH = {"x": math.sqrt(2 / math.pi), "xxx": 0.044715 * math.sqrt(2 / math.pi)}
_GELU = {"x": 0.5, "fx": 0.5}


@tvm.transform.module_pass(opt_level=0, name="pumice.FuseGelu")
class FuseGelu:
    """``x / 2 * (1 + erf(x / sqrt(2))) -> nn.gelu(x)``, the form with ``tanh`` ``-> nn.gelu_tanh(x)``.

    The expression is compared as a polynomial in ``x`` and ``f = erf(...)``, so the order of its products and
    sums, and whether a factor is a division, does not matter.
    """

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Fuse every GELU."""
        return rewrite(mod, _fuse)


Polynomial = dict[str, float]  # coefficient by monomial; a monomial is its sorted letters, "" the constant


def _fuse(rw: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
    if op_name(value) not in ("relax.multiply", "relax.divide") or not is_tensor(var):
        return None
    bell = _find(rw, value, ("erf", "tanh"))
    inner = None if bell is None else rw.call(bell)
    if bell is None or inner is None:
        return None
    is_erf = op_name(inner) == "relax.erf"
    for x in _leaves(rw, inner.args[0]):
        argument = _polynomial(rw, inner.args[0], {"x": x})
        if argument is None or not _close(argument, _ERF if is_erf else _TANH):
            continue
        whole = _polynomial(rw, value, {"x": x, "f": bell})
        if whole is not None and _close(whole, _GELU):
            return relax.op.nn.gelu(x) if is_erf else relax.op.nn.gelu_tanh(x)
    return None


def _find(rw: Rewriter, value: relax.Expr, operators: tuple[str, ...]) -> relax.Expr | None:
    """The result of the first such call that a tree of products and sums contains."""
    for arg in value.args:
        inner = rw.call(arg)
        if inner is None:
            continue
        if op_name(inner).removeprefix("relax.") in operators:
            return arg
        if op_name(inner) in ("relax.multiply", "relax.divide", "relax.add"):
            found = _find(rw, inner, operators)
            if found is not None:
                return found
    return None


def _leaves(rw: Rewriter, expr: relax.Expr, depth: int = 6) -> list[relax.Expr]:
    """Everything that an expression's variable may be: each node on the way down, the nearest to the top first."""
    if rw.scalar(expr) is not None:
        return []
    found = [expr]
    call = rw.call(expr, "multiply", "divide", "add", "power")
    if call is not None and depth:
        for arg in call.args:
            found += [leaf for leaf in _leaves(rw, arg, depth - 1) if not any(leaf.same_as(f) for f in found)]
    return found


def _polynomial(rw: Rewriter, expr: relax.Expr, letters: dict[str, relax.Expr], depth: int = 8) -> Polynomial | None:
    """The expression as a polynomial in ``letters``; None where it is something else."""
    for letter, meaning in letters.items():
        if expr.same_as(meaning):
            return {letter: 1.0}
    constant = rw.scalar(expr)
    if constant is not None:
        return {"": constant}
    call = rw.call(expr, "multiply", "divide", "add", "power")
    if call is None or not depth:
        return None
    left, right = (_polynomial(rw, arg, letters, depth - 1) for arg in call.args)
    if left is None or right is None:
        return None
    operator = op_name(call).removeprefix("relax.")
    if operator == "add":
        return _add(left, right)
    if operator == "multiply":
        return _multiply(left, right)
    if set(right) != {""} or not right[""]:
        return None
    if operator == "divide":
        return {m: c / right[""] for m, c in left.items()}
    if right[""] not in (1, 2, 3):
        return None
    power = left
    for _ in range(int(right[""]) - 1):
        power = _multiply(power, left)
    return power


def _add(a: Polynomial, b: Polynomial) -> Polynomial:
    return {m: a.get(m, 0.0) + b.get(m, 0.0) for m in {*a, *b}}


def _multiply(a: Polynomial, b: Polynomial) -> Polynomial:
    product: Counter[str] = Counter()
    for m, c in a.items():
        for n, d in b.items():
            product["".join(sorted(m + n))] += c * d  # type: ignore[assignment]
    return dict(product)


def _close(found: Polynomial, wanted: Polynomial) -> bool:
    """Equal up to the float32 rounding of the constants, and to the digits that exporters write them with."""
    return all(math.isclose(found.get(m, 0), wanted.get(m, 0), rel_tol=1e-4, abs_tol=1e-9) for m in {*found, *wanted})
