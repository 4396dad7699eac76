"""Running a module form on this machine, float or quantized: what calibration and error measurement stand on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.errors import ModelError, UnsupportedError
from pumice.module import inputs_of, output_names_of, source_of, weight_vars_of, weights_of
from pumice.passes.pipeline import LowerOptions, lower
from pumice.targets.build import build as target_build
from pumice.targets.target import Target


def build(mod: IRModule) -> tuple[relax.VMExecutable, list[np.ndarray]]:
    """Compile ``main(inputs..., weights...)`` for this CPU; the arrays are what its weight parameters take.

    It is Pumice's own lowering: what is measured of a quantized module are the very integers that ship.
    """
    target = Target.parse("native")
    lowered = lower(mod, target, LowerOptions(threads=os.cpu_count() or 1))
    weights = weights_of(lowered)
    arrays = [weights[var.name] for var in weight_vars_of(lowered)]  # before building, which empties the module
    return target_build(lowered, target), arrays


class Evaluator:
    """A compiled module; ``run`` gives its outputs, ``observe`` the values of the tapped variables."""

    def __init__(self, mod: IRModule, taps: Sequence[relax.Var] = ()) -> None:
        """Compile ``mod``; ``taps`` are variables of its ``main``.

        Raises:
            UnsupportedError: an operator that cannot be compiled.
        """
        self._source = source_of(mod)
        self._inputs = inputs_of(mod)
        self._output_names = output_names_of(mod)
        self._taps = list(dict.fromkeys(taps))
        try:
            executable, weights = build(_with_taps(mod, self._taps))
        except (tvm.error.InternalError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UnsupportedError(f"{self._source}: cannot be evaluated on this machine: {reason}") from error
        self._weights = [tvm.runtime.tensor(weight) for weight in weights]
        self._main = relax.VirtualMachine(executable, tvm.cpu())["main"]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The model's outputs by name, for arrays by input name."""
        values = self._call(inputs)[: len(self._output_names)]
        return dict(zip(self._output_names, values, strict=True))

    def observe(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The values of the tapped variables, in the order in which they were given."""
        return self._call(inputs)[len(self._output_names) :]

    def _call(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        missing = [var.name for var in self._inputs if var.name not in inputs]
        if missing:
            raise ModelError(f"{self._source}: no array for input {missing[0]!r}; its inputs are {self._names()}")
        # reshape: ascontiguousarray turns a scalar into a vector.
        arrays = [np.asarray(inputs[var.name], dtype=str(var.ty.dtype)) for var in self._inputs]
        arguments = [tvm.runtime.tensor(np.ascontiguousarray(array).reshape(array.shape)) for array in arrays]
        return [value.numpy() for value in self._main(*arguments, *self._weights)]

    def _names(self) -> str:
        return ", ".join(repr(var.name) for var in self._inputs)


def _with_taps(mod: IRModule, taps: Sequence[relax.Var]) -> IRModule:
    """``main`` returning one flat tuple: its outputs, then the taps."""
    main = mod["main"]
    bindings = [binding for block in main.body.blocks for binding in block.bindings]
    returned = main.body.body
    bound = {binding.var: binding.value for binding in bindings}
    if isinstance(returned, relax.Tuple):
        outputs = list(returned.fields)
    elif isinstance(returned.ty, relax.TupleType):
        outputs = list(bound[returned].fields)
    else:
        outputs = [returned]
    everything = relax.Tuple([*outputs, *taps])
    result = relax.Var("values", relax.TupleType([field.ty for field in everything.fields]))
    block = relax.DataflowBlock([*bindings, relax.VarBinding(result, everything)])
    body = relax.SeqExpr([block], result)
    func = relax.Function(main.params, body, result.ty, main.is_pure, main.attrs)
    tapped = mod.clone()
    tapped.update_func(mod.get_global_var("main"), func)
    return tapped
