"""Running a module form on this machine, float or quantized: what calibration and error measurement stand on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.errors import ModelError, UnsupportedError
from pumice.module import inputs_of, output_names_of, source_of
from pumice.passes.link_steps import link_steps
from pumice.passes.pipeline import LowerOptions, lower
from pumice.targets.executor import build_executor
from pumice.targets.target import Target


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
        target = Target.parse("native")
        try:
            # Pumice's own lowering: what is measured of a quantized module are the very integers that ship.
            lowered = lower(_with_taps(mod, self._taps), target, LowerOptions(threads=os.cpu_count() or 1))
            self._executor = build_executor(link_steps(lowered), target)
        except (tvm.error.InternalError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UnsupportedError(f"{self._source}: cannot be evaluated on this machine: {reason}") from error

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
        for var, buffer in zip(self._inputs, self._executor.inputs, strict=True):
            array = np.asarray(inputs[var.name], dtype=buffer.dtype)
            if array.shape != buffer.shape:
                raise ModelError(f"{self._source}: input {var.name!r} has shape {array.shape}, not {buffer.shape}")
            buffer[...] = array
        self._executor.run()
        return [buffer.copy() for buffer in self._executor.outputs]

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
