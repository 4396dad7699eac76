"""A module's ``main``, or a piece of it, as a differentiable function in PyTorch.

A sample keeps the shapes that the graph declares; many samples run at once by ``torch.func.vmap``, so a graph that was
exported for a batch of 1, with that 1 in its reshapes, runs on any number of them, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import GenericConst, IRModule

from pumice.errors import UnsupportedError
from pumice.module import inputs_of, source_of, weight_vars_of, weights_of
from pumice.passes.dataflow import Dataflow, operands, operator_name
from pumice.passes.numpy_operators import plain
from pumice.passes.torch_operators import Tensor, rule_of, torch

Bindings = Sequence[tuple[relax.Var, relax.Expr]]


class TorchGraph:
    """Bindings of a module, from some of its variables to others.

    ``inputs`` and ``outputs`` are variables; what is between them is computed by ``bindings``, of which those that no
    output needs are left out. Weights are given at each call, so that they can be parameters, masked or rounded.
    """

    def __init__(
        self,
        mod: IRModule,
        bindings: Bindings,
        inputs: Sequence[relax.Var],
        outputs: Sequence[relax.Var],
    ) -> None:
        """Raises UnsupportedError, naming it, for an operator without a rule."""
        self.inputs = list(inputs)
        self.outputs = list(outputs)
        self._source = mod, bindings
        self._bindings = _needed(bindings, set(inputs), set(outputs))
        read = {operand for _, value in self._bindings for operand in operands(value)} | set(outputs)
        self._weights = [var for var in weight_vars_of(mod) if var in read]
        for var, value in self._bindings:
            if isinstance(value, relax.Call) and rule_of(operator_name(value)) is None:
                raise UnsupportedError(
                    f"{source_of(mod)}: {var.name} is computed by {operator_name(value) or value.op}, which has no "
                    "rule in PyTorch, so the model cannot be trained here; leave reconstruction out"
                )

    @classmethod
    def of(cls, mod: IRModule, outputs: Sequence[relax.Var] | None = None) -> TorchGraph:
        """All of ``main``: from the model's inputs to its outputs, or to these variables."""
        flow = Dataflow(mod)
        return cls(mod, flow.bindings, flow.inputs, _results(mod) if outputs is None else outputs)

    def to(self, outputs: Sequence[relax.Var]) -> TorchGraph:
        """The same to other variables."""
        return TorchGraph(*self._source, self.inputs, outputs)

    @property
    def weights(self) -> list[str]:
        """The names of the weights that it reads."""
        return [str(var.name) for var in self._weights]

    def __call__(
        self,
        values: Iterable[Tensor],
        weights: Mapping[str, Tensor],
        rounding: Mapping[relax.Var, Callable[[Tensor], Tensor]] | None = None,
        lengths: Mapping[int, int] | None = None,
    ) -> tuple[Tensor, ...]:
        """The outputs for many samples, each with a leading axis of samples: ``[samples, *declared shape]``.

        ``values`` are the inputs in that form too, ``weights`` tensors by name. ``rounding`` holds, by the variable
        of a layer, what is done to its data before it reads it. ``lengths`` replaces sizes in the shapes that the
        graph declares: ``{128: 20}`` runs a graph of 128 tokens on 20, if its values allow it.
        """

        def one(*sample: Tensor) -> tuple[Tensor, ...]:
            return self._run(sample, weights, rounding or {}, lengths or {})

        result: tuple[Tensor, ...] = torch.func.vmap(one)(*values)
        return result

    def _run(
        self,
        sample: Sequence[Tensor],
        weights: Mapping[str, Tensor],
        rounding: Mapping[relax.Var, Callable[[Tensor], Tensor]],
        lengths: Mapping[int, int],
    ) -> tuple[Tensor, ...]:
        known: dict[relax.Var, Any] = {var: weights[var.name] for var in self._weights}
        known.update(zip(self.inputs, sample, strict=True))
        for var, value in self._bindings:
            if isinstance(value, relax.Call):
                arguments = [_argument(argument, known, lengths) for argument in value.args]
                if var in rounding:
                    arguments[0] = rounding[var](arguments[0])
                rule = rule_of(operator_name(value))
                assert rule is not None
                known[var] = rule(value, var.ty, *arguments)
            else:
                known[var] = _argument(value, known, lengths)
        return tuple(known[var] for var in self.outputs)


def tensors_of(mod: IRModule, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The weights of ``mod`` (all, or those of these names) as tensors of their own."""
    stored = weights_of(mod)
    return {name: tensor_of(stored[name]) for name in (stored if names is None else names)}


def tensor_of(array: np.ndarray) -> Tensor:
    """A copy of an array."""
    return torch.from_numpy(np.array(array))


def stacked(mod: IRModule, samples: Iterable[Mapping[str, np.ndarray]]) -> list[Tensor]:
    """Samples, arrays by input name, as what ``TorchGraph.of(mod)`` takes: a tensor for each input."""
    held = list(samples)
    return [tensor_of(np.stack([sample[var.name] for sample in held])) for var in inputs_of(mod)]


def _argument(expr: relax.Expr, known: Mapping[relax.Var, Any], lengths: Mapping[int, int]) -> Any:
    """An operand as a rule takes it."""
    if isinstance(expr, relax.Var):
        return known[expr]
    if isinstance(expr, relax.Tuple):
        return tuple(_argument(field, known, lengths) for field in expr.fields)
    if isinstance(expr, relax.TupleGetItem):
        return _argument(expr.tuple_value, known, lengths)[expr.index]
    if isinstance(expr, relax.ShapeExpr):
        return tuple(lengths.get(int(size), int(size)) for size in expr.values)
    value = plain(expr)
    return tensor_of(value) if isinstance(expr, GenericConst) else value


def _needed(bindings: Bindings, given: set[relax.Var], wanted: set[relax.Var]) -> Bindings:
    """The bindings that these variables depend on, without what is given."""
    kept = []
    wanted = wanted - given
    for var, value in reversed(bindings):
        if var in wanted:
            kept.append((var, value))
            wanted |= set(operands(value)) - given
    return kept[::-1]


def _results(mod: IRModule) -> list[relax.Var]:
    """What ``main`` returns, its tuple opened, in order."""
    result = mod["main"].body.body
    value = Dataflow(mod).value.get(result, result)
    found = value if isinstance(value, relax.Tuple) else result
    return list(found.fields) if isinstance(found, relax.Tuple) else [found]
