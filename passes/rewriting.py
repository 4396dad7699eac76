"""One walk over ``main``: what every rewriting pass of Pumice is made of.

A pass gives ``rewrite`` a visitor. The walk goes through the bindings in order, hands each to the visitor with
its operands already rewritten, and binds what the visitor returns in its place. At the end what nobody reads is
dropped, bindings and weights alike, and every name is unique: calibration keys activations by variable name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst, IRModule, Op
from tvm_ffi import structural_equal

from pumice.errors import PumiceError, UnsupportedError
from pumice.module import inputs_of, source_of, weight_vars_of, weights_of, with_weights

Visitor = Callable[["Rewriter", relax.Var, relax.Expr], relax.Expr | None]


def rewrite(mod: IRModule, visit: Visitor) -> IRModule:
    """``mod`` with each binding of ``main`` replaced by what ``visit(rewriter, var, value)`` returns.

    None keeps the binding. Raises UnsupportedError for a ``main`` with control flow.
    """
    return Rewriter(mod).run(visit)


def op_name(expr: relax.Expr | None) -> str:
    """The operator of a call, as ``relax.add``; empty for everything else."""
    return str(expr.op.name) if isinstance(expr, relax.Call) and isinstance(expr.op, Op) else ""


def shape_of(expr: relax.Expr) -> tuple[int, ...]:
    """The static shape of a tensor."""
    return tuple(int(d) for d in expr.ty.shape)


def dtype_of(expr: relax.Expr) -> str:
    """The element type of a tensor, as numpy calls it."""
    return str(expr.ty.dtype)


def array_of(expr: relax.Expr, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """The value of a constant, or of a variable that is one of the ``weights``."""
    value: np.ndarray = weights[expr.name] if isinstance(expr, relax.Var) else expr.value.numpy()
    return value


def is_tensor(expr: relax.Expr) -> bool:
    """Whether the expression is a tensor of known, static shape."""
    ty = expr.ty
    return (
        isinstance(ty, relax.TensorType)
        and isinstance(ty.shape, relax.ShapeExpr)
        and all(isinstance(d, tvm.tirx.IntImm) for d in ty.shape)
    )


def bindings_of(mod: IRModule) -> list[tuple[relax.Var, relax.Expr]]:
    """The bindings of ``main`` in order; raises UnsupportedError where there is more than straight-line code."""
    main = mod["main"]
    if not isinstance(main.body, relax.SeqExpr):
        return []
    bindings = []
    for block in main.body.blocks:
        for binding in block.bindings:
            if not isinstance(binding, relax.VarBinding) or isinstance(binding.value, relax.If | relax.SeqExpr):
                raise UnsupportedError(
                    f"{source_of(mod)}: {binding.var.name} needs control flow or a shape known only at run time; "
                    "pin the input shapes, or export the model without branches"
                )
            bindings.append((binding.var, binding.value))
    return bindings


class Rewriter:
    """The state of one walk: what is known of the operands, and what has been emitted so far."""

    def __init__(self, mod: IRModule) -> None:
        self.mod = mod
        self._bindings = bindings_of(mod)
        values = weights_of(mod)
        self._arrays = {var: values[var.name] for var in weight_vars_of(mod) if var.name in values}
        self._original = list(self._arrays)
        self._users: dict[relax.Var, list[tuple[relax.Var, relax.Expr]]] = {}
        for var, value in self._bindings:
            for leaf in _vars_in(value):
                self._users.setdefault(leaf, []).append((var, value))
        self._output = mod["main"].body.body
        self._replaced: dict[relax.Var, relax.Expr] = {}
        self._origins: dict[relax.Var, list[relax.Var]] = {}
        self._bound: dict[relax.Var, relax.Expr] = {}
        self._emitted: list[tuple[relax.Var, relax.Expr]] = []
        self._taken = {var.name for var in mod["main"].params}
        self._builder = relax.BlockBuilder()
        self._current = "value"

    def run(self, visit: Visitor) -> IRModule:
        """Walk, and give the rewritten module."""
        for var, value in self._bindings:
            self._current = var.name
            operand_ready = self._substitute(value)
            result = visit(self, var, operand_ready)
            self._bind(var, operand_ready if result is None else result)
        return self._finish()

    # What is known of an operand

    def call(self, expr: relax.Expr, *operators: str) -> relax.Call | None:
        """The call that computes ``expr``, if it is one of these operators (named without ``relax.``)."""
        value = self._bound.get(expr) if isinstance(expr, relax.Var) else expr
        name = op_name(value)
        return value if name and (not operators or name.removeprefix("relax.") in operators) else None

    def value(self, expr: relax.Expr) -> relax.Expr | None:
        """What a variable is bound to; None for inputs, weights and constants."""
        return self._bound.get(expr) if isinstance(expr, relax.Var) else expr

    def item(self, expr: relax.Expr, index: int, *operators: str) -> relax.Call | None:
        """The call whose output number ``index`` the tuple access ``expr`` takes, if one of these operators."""
        if isinstance(expr, relax.TupleGetItem) and expr.index == index:
            return self.call(expr.tuple_value, *operators)
        return None

    def array(self, expr: relax.Expr) -> np.ndarray | None:
        """The value of a weight or constant; None for what is computed at run time."""
        if isinstance(expr, GenericConst):
            return expr.value.numpy() if isinstance(expr.ty, relax.TensorType) else None
        return self._arrays.get(expr) if isinstance(expr, relax.Var) else None

    def scalar(self, expr: relax.Expr) -> float | None:
        """The value of a constant (not a weight) that has one element."""
        if isinstance(expr, GenericConst):
            value = self.array(expr)
            if value is not None and value.size == 1:
                return float(value.reshape(()))
        return None

    def is_weight(self, expr: relax.Expr) -> bool:
        """Whether the expression is a weight parameter whose value is known."""
        return isinstance(expr, relax.Var) and expr in self._arrays

    def uses(self, expr: relax.Expr) -> int:
        """How many operands, outputs included, read this value in the module as it was before the walk."""
        if not isinstance(expr, relax.Var):
            return 1
        # A variable that this walk made up (no origin) is read by the expression it was made for only.
        origins = self._origins.get(expr, [expr] if expr in self._users else [])
        counts = [len(self._users.get(o, [])) + sum(o.same_as(v) for v in _vars_in(self._output)) for o in origins]
        return max(1, int(sum(counts)))

    def users(self, var: relax.Var) -> list[tuple[relax.Var, relax.Expr]]:
        """The bindings, of the module as it was, that read ``var``."""
        return self._users.get(var, [])

    def is_output(self, var: relax.Var) -> bool:
        """Whether ``main`` returned ``var`` before the walk."""
        return any(var.same_as(out) for out in _vars_in(self._output))

    # What a visitor makes

    def emit(self, value: relax.Expr, suffix: str = "") -> relax.Expr:
        """Bind ``value`` to a new variable, named after the binding that is being rewritten."""
        return self._emit(value, relax.DataflowVar, f"{self._current}_{suffix}" if suffix else self._current)

    def weight(self, name: str, value: np.ndarray) -> relax.Var:
        """A new weight parameter. Where another weight in use has the name too, this becomes ``name#2``."""
        value = np.ascontiguousarray(value).reshape(value.shape)
        var = relax.Var(name, relax.TensorType(value.shape, str(value.dtype)))
        self._arrays[var] = value
        return var

    def derived(self, sources: Iterable[relax.Expr], value: np.ndarray) -> relax.Expr:
        """``value`` computed from these operands: a weight named after the largest weight, or a constant."""
        weights = [s for s in sources if self.is_weight(s)]
        if not weights:
            return relax.const(value, str(value.dtype))
        largest = max(weights, key=lambda w: (self._arrays[w].size, w.name.endswith("bias")))
        return self.weight(largest.name, value)

    # Machinery

    def _substitute(self, expr: relax.Expr) -> relax.Expr:
        if isinstance(expr, relax.Var):
            return self._replaced.get(expr, expr)
        if isinstance(expr, relax.Tuple):
            fields = [self._substitute(f) for f in expr.fields]
            return expr if _same(fields, expr.fields) else relax.Tuple(fields)
        if isinstance(expr, relax.TupleGetItem):
            base = self._substitute(expr.tuple_value)
            if isinstance(base, relax.Var) and isinstance(self._bound.get(base), relax.Tuple):
                base = self._bound[base]
            if isinstance(base, relax.Tuple):
                return base.fields[expr.index]
            return expr if base.same_as(expr.tuple_value) else relax.TupleGetItem(base, expr.index)
        if isinstance(expr, relax.Call):
            args = [self._substitute(a) for a in expr.args]
            return expr if _same(args, expr.args) else relax.Call(expr.op, args, expr.attrs, expr.ty_args)
        return expr

    def _bind(self, var: relax.Var, value: relax.Expr) -> None:
        if isinstance(value, relax.Var | GenericConst):
            new = value
        else:
            kind = relax.DataflowVar if isinstance(var, relax.DataflowVar) else relax.Var
            new = self._emit(value, kind, var.name, keep=var)
        if is_tensor(var) and (shape_of(new), dtype_of(new)) != (shape_of(var), dtype_of(var)):
            raise PumiceError(
                f"{source_of(self.mod)}: a pass turned {var.name} from {var.ty} into {new.ty}; this is a defect in "
                "Pumice, please report it"
            )
        self._replaced[var] = new
        if isinstance(new, relax.Var):
            self._origins.setdefault(new, []).append(var)

    def _emit(self, value: relax.Expr, kind: type[relax.Var], name: str, keep: relax.Var | None = None) -> relax.Expr:
        if isinstance(value, relax.Var | GenericConst):
            return value
        if isinstance(value, relax.Call):
            args = [self._emit(a, relax.DataflowVar, name) if isinstance(a, relax.Call) else a for a in value.args]
            if not _same(args, value.args):
                value = relax.Call(value.op, args, value.attrs, value.ty_args)
        value = self._builder.normalize(value)
        unique = name
        suffix = 0
        while unique in self._taken:
            suffix += 1
            unique = f"{name}_{suffix}"
        self._taken.add(unique)
        unchanged = keep is not None and keep.name == unique and structural_equal(keep.ty, value.ty)
        var = keep if unchanged else kind(unique, value.ty)
        self._emitted.append((var, value))
        self._bound[var] = value
        return var

    def _finish(self) -> IRModule:
        output = self._substitute(self._output)
        live_vars = set(_vars_in(output))
        body = []
        for var, value in reversed(self._emitted):
            if var in live_vars:
                live_vars.update(_vars_in(value))
                body.append((var, value))
        body.reverse()
        weights, renamed = self._name_weights(live_vars)
        body, output = _with_outputs(body, output)
        self._replaced = renamed
        bindings = [relax.VarBinding(var, self._substitute(value)) for var, value in body]
        main = self.mod["main"]
        params = [*inputs_of(self.mod), *self._unknown_weights(), *weights]
        sequence = relax.SeqExpr([relax.DataflowBlock(bindings)], self._substitute(output))
        function = relax.Function(params, sequence, main.ret_ty, main.is_pure, main.attrs)
        mod = self.mod.clone()
        mod.update_func(mod.get_global_var("main"), self._builder.normalize(function))
        return with_weights(mod, {var.name: self._arrays[source] for var, source in weights.items()})

    def _unknown_weights(self) -> list[relax.Var]:
        """Parameters behind the inputs whose value the module does not carry: they stay as they are."""
        return [var for var in weight_vars_of(self.mod) if var not in self._arrays]

    def _name_weights(self, live: set[relax.Var]) -> tuple[dict[relax.Var, relax.Var], dict[relax.Var, relax.Var]]:
        """The parameters to be (each with the variable that holds its array), and who is replaced by which."""
        by_name: dict[str, list[relax.Var]] = {}
        renamed: dict[relax.Var, relax.Var] = {}
        for var in self._arrays:  # the source's own weights come first, and so keep their names
            if var not in live:
                continue
            group = by_name.setdefault(var.name, [])
            twin = next((g for g in group if _equal(self._arrays[g], self._arrays[var])), None)
            if twin is None:
                group.append(var)
            else:
                renamed[var] = twin
        inputs = {var.name for var in [*inputs_of(self.mod), *self._unknown_weights()]}
        taken = inputs | set(by_name)
        order = {var.name: i for i, var in enumerate(self._original)}
        weights: dict[relax.Var, relax.Var] = {}
        for name in sorted(by_name, key=lambda n: order.get(n, len(order))):
            for i, var in enumerate(by_name[name]):
                unique, number = name, 1
                while unique in inputs or ((number, i) != (1, 0) and unique in taken):
                    number += 1
                    unique = f"{name}#{number}"
                taken.add(unique)
                final = var if unique == name else relax.Var(unique, var.ty)
                weights[final] = var
                if final is not var:
                    renamed[var] = final
        for var, twin in list(renamed.items()):
            renamed[var] = renamed.get(twin, twin)
        return weights, renamed


def _with_outputs(
    body: list[tuple[relax.Var, relax.Expr]], output: relax.Expr
) -> tuple[list[tuple[relax.Var, relax.Expr]], relax.Expr]:
    """Make what ``main`` returns plain variables: a DataflowVar cannot leave its block, nor a constant be bare."""
    fresh: dict[relax.Var, relax.Var] = {}
    for var in _vars_in(output):
        if isinstance(var, relax.DataflowVar):
            fresh[var] = relax.Var(var.name, var.ty)
    if not fresh:
        return body, output
    substitute = _Substitution(fresh)
    return [(fresh.get(v, v), substitute(value)) for v, value in body], substitute(output)


class _Substitution:
    """Variables replaced by variables, in an expression."""

    def __init__(self, replaced: dict[relax.Var, relax.Var]) -> None:
        self._replaced = replaced

    def __call__(self, expr: relax.Expr) -> relax.Expr:
        if isinstance(expr, relax.Var):
            return self._replaced.get(expr, expr)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self(f) for f in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self(expr.tuple_value), expr.index)
        if isinstance(expr, relax.Call):
            args = [self(a) for a in expr.args]
            return expr if _same(args, expr.args) else relax.Call(expr.op, args, expr.attrs, expr.ty_args)
        return expr


def _vars_in(expr: relax.Expr) -> list[relax.Var]:
    """The variables that an expression reads, one entry a read."""
    if isinstance(expr, relax.Var):
        return [expr]
    if isinstance(expr, relax.Tuple):
        return [v for f in expr.fields for v in _vars_in(f)]
    if isinstance(expr, relax.TupleGetItem):
        return _vars_in(expr.tuple_value)
    if isinstance(expr, relax.Call):
        return [v for a in expr.args for v in _vars_in(a)]
    return []


def _same(a: Iterable[relax.Expr], b: Iterable[relax.Expr]) -> bool:
    return all(x.same_as(y) for x, y in zip(a, b, strict=True))


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
