"""The dataflow block of ``main`` as a graph: who produces a value, who reads it, what depends on the inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from tvm import relax
from tvm.ir import IRModule, Op

from pumice.errors import UnsupportedError
from pumice.module import inputs_of, source_of, weight_vars_of


class Dataflow:
    """A read-only view of ``main``; variables are in execution order, inputs first."""

    def __init__(self, mod: IRModule) -> None:
        self.inputs = inputs_of(mod)
        self.weights = set(weight_vars_of(mod))
        self.bindings: list[tuple[relax.Var, relax.Expr]] = []
        for block in mod["main"].body.blocks:
            for binding in block.bindings:
                if not isinstance(binding, relax.VarBinding):
                    raise UnsupportedError(
                        f"{source_of(mod)}: {binding.var.name} is cast to a shape only known at run time; "
                        "give every input's shape, then the shapes in between are static"
                    )
                self.bindings.append((binding.var, binding.value))
        self.value = dict(self.bindings)
        self.order = {var: i for i, var in enumerate([*self.inputs, *self.value])}
        self.users: dict[relax.Var, list[relax.Var]] = {var: [] for var in [*self.order, *self.weights]}
        for var, value in self.bindings:
            for operand in dict.fromkeys(operands(value)):
                self.users[operand].append(var)
        self.outputs = self._resolve_outputs(mod["main"].body.body)
        self.activations = self._find_activations()
        self.names = self._unique_names()

    def op(self, var: relax.Expr) -> str:
        """The operator that produces ``var``, without ``relax.``: ``nn.conv2d``; empty for anything else."""
        return operator_name(self.value[var]) if isinstance(var, relax.Var) and var in self.value else ""

    def activation_operands(self, var: relax.Var) -> list[relax.Var]:
        """The operands of ``var`` that depend on the model's inputs, each once."""
        found = operands(self.value[var]) if var in self.value else []
        return [operand for operand in dict.fromkeys(found) if operand in self.activations]

    def only_user(self, var: relax.Var) -> relax.Var | None:
        """The one variable that reads ``var``, None if there are more or it is an output."""
        users = self.users[var]
        return users[0] if len(users) == 1 and var not in self.outputs else None

    def biased(self, layer: relax.Var) -> relax.Var:
        """The layer's result after its bias, if ``add(layer, a value per channel)`` is all that reads it."""
        user = self.only_user(layer)
        return user if user is not None and self.bias(user, layer) is not None else layer

    def bias(self, added: relax.Var, layer: relax.Var) -> relax.Expr | None:
        """What ``added = add(layer, bias)`` adds per output channel, a weight or constant; None for anything else."""
        if self.op(added) != "add":
            return None
        bias = next((argument for argument in self.value[added].args if argument != layer), None)
        if bias is None or (isinstance(bias, relax.Var) and bias not in self.weights):
            return None
        shape, result = [int(d) for d in bias.ty.shape], [int(d) for d in layer.ty.shape]
        per_channel = [1] * len(result)
        axis = 1 if self.op(layer) == "nn.conv2d" else -1
        per_channel[axis] = result[axis]
        return bias if [1] * (len(result) - len(shape)) + shape == per_channel else None

    def _resolve_outputs(self, result: relax.Expr) -> set[relax.Var]:
        """The variables whose values ``main`` returns, through the variable that names their tuple."""
        found: set[relax.Var] = set()
        pending = [result]
        while pending:
            expr = pending.pop()
            if isinstance(expr, relax.Tuple):
                pending.extend(expr.fields)
            elif isinstance(expr, relax.Var):
                found.add(expr)
                if isinstance(self.value.get(expr), (relax.Tuple, relax.Var)):
                    pending.append(self.value[expr])
        return found

    def _find_activations(self) -> set[relax.Var]:
        reached = set(self.inputs)
        for var, value in self.bindings:
            if not reached.isdisjoint(operands(value)):
                reached.add(var)
        return reached

    def _unique_names(self) -> dict[relax.Var, str]:
        seen: Counter[str] = Counter()
        names = {}
        for var in self.order:
            seen[var.name] += 1
            count = seen[var.name]
            names[var] = var.name if count == 1 else f"{var.name}#{count}"
        return names


def operator_name(value: relax.Expr) -> str:
    """The name of the operator that a value calls, without ``relax.``; empty if it calls none."""
    if isinstance(value, relax.Call) and isinstance(value.op, Op):
        return str(value.op.name).removeprefix("relax.")
    return ""


def operands(value: relax.Expr) -> list[relax.Var]:
    """The variables that a value reads, tuples opened."""
    return list(_operands(value))


def _operands(value: relax.Expr) -> Iterator[relax.Var]:
    if isinstance(value, relax.Var):
        yield value
    elif isinstance(value, relax.Call):
        for argument in value.args:
            yield from _operands(argument)
    elif isinstance(value, relax.Tuple):
        for item in value.fields:
            yield from _operands(item)
    elif isinstance(value, relax.TupleGetItem):
        yield from _operands(value.tuple_value)


def substitute(value: relax.Expr, replacement: dict[relax.Var, relax.Expr]) -> relax.Expr:
    """``value`` with its variables replaced."""
    if isinstance(value, relax.Var):
        return replacement.get(value, value)
    if isinstance(value, relax.Call):
        arguments = [substitute(argument, replacement) for argument in value.args]
        return relax.Call(value.op, arguments, value.attrs, value.ty_args)
    if isinstance(value, relax.Tuple):
        return relax.Tuple([substitute(item, replacement) for item in value.fields])
    if isinstance(value, relax.TupleGetItem):
        return relax.TupleGetItem(substitute(value.tuple_value, replacement), value.index)
    return value
