"""Running a module form on this machine, float or quantized: what calibration and error measurement stand on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.errors import ModelError, UnsupportedError
from pumice.module import inputs_of, output_names_of, source_of, weights_of
from pumice.passes.link_steps import link_steps
from pumice.passes.pipeline import LowerOptions, lower
from pumice.targets.executor import build_executor
from pumice.targets.target import Target
from pumice.threads import default_threads


class Evaluator:
    """A compiled module; ``run`` gives its outputs, ``observe`` the values of tapped variables."""

    def __init__(self, mod: IRModule, taps: Sequence[relax.Var] = (), with_outputs: bool = True) -> None:
        """Compile ``mod``; ``taps`` are variables of its ``main``.

        Without the outputs ``observe`` computes no more than the taps need, and ``run`` gives nothing.

        Raises:
            UnsupportedError: an operator that cannot be compiled.
        """
        self._source = source_of(mod)
        self._inputs = inputs_of(mod)
        self._output_names = output_names_of(mod) if with_outputs else []
        self._taps = list(dict.fromkeys(taps))
        target = Target.parse("native")
        try:
            # Pumice's own lowering: what is measured of a quantized module are the very integers that ship.
            lowered = lower(_with_taps(mod, self._taps, with_outputs), target, LowerOptions(threads=default_threads()))
            self._executor = build_executor(link_steps(lowered), target)
        except (tvm.error.InternalError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UnsupportedError(f"{self._source}: cannot be evaluated on this machine: {reason}") from error

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The model's outputs by name, for arrays by input name."""
        self._call(inputs)
        return {name: buffer.copy() for name, buffer in zip(self._output_names, self._executor.outputs, strict=False)}

    def observe(self, inputs: Mapping[str, np.ndarray], taps: Sequence[relax.Var] | None = None) -> list[np.ndarray]:
        """The values of these tapped variables; of all, in the order in which they were given, if ``taps`` is None."""
        self._call(inputs)
        buffers = dict(zip(self._taps, self._executor.outputs[len(self._output_names) :], strict=True))
        return [buffers[tap].copy() for tap in (self._taps if taps is None else taps)]

    def observes(self, taps: Sequence[relax.Var]) -> bool:
        """Whether these are taps of it."""
        return set(taps) <= set(self._taps)

    def _call(self, inputs: Mapping[str, np.ndarray]) -> None:
        missing = [var.name for var in self._inputs if var.name not in inputs]
        if missing:
            raise ModelError(f"{self._source}: no array for input {missing[0]!r}; its inputs are {self._names()}")
        for var, buffer in zip(self._inputs, self._executor.inputs, strict=True):
            array = np.asarray(inputs[var.name], dtype=buffer.dtype)
            if array.shape != buffer.shape:
                raise ModelError(f"{self._source}: input {var.name!r} has shape {array.shape}, not {buffer.shape}")
            buffer[...] = array
        self._executor.run()

    def _names(self) -> str:
        return ", ".join(repr(var.name) for var in self._inputs)


class SharedEvaluator:
    """The evaluator of passes that run one module on samples, one after the other: it is compiled once.

    That is when the first of them asks, with the variables ``foreseen`` that later ones will observe. Another module,
    or other variables, have an evaluator made for them alone.
    """

    def __init__(self, mod: IRModule | None = None, foreseen: Sequence[relax.Var] = ()) -> None:
        """``mod`` is the module that is shared; without one, that which is asked for first."""
        self._mod = mod
        self._foreseen = list(foreseen)
        self._made: Evaluator | None = None

    def of(self, mod: IRModule, taps: Sequence[relax.Var]) -> Evaluator:
        """An evaluator of ``mod`` that observes ``taps``. Raises what ``Evaluator`` does."""
        if self._mod is None:
            self._mod = mod
        if not _compute_the_same(self._mod, mod):
            return Evaluator(mod, taps)
        if self._made is None:
            self._made = Evaluator(mod, [*taps, *self._foreseen])
        return self._made if self._made.observes(taps) else Evaluator(mod, taps)


def _compute_the_same(mod: IRModule, other: IRModule) -> bool:
    """Whether they have one graph and the very same weights, whatever is recorded about their layers."""
    first, second = ({name: array.ctypes.data for name, array in weights_of(m).items()} for m in (mod, other))
    return mod["main"].same_as(other["main"]) and first == second


def _with_taps(mod: IRModule, taps: Sequence[relax.Var], with_outputs: bool) -> IRModule:
    """``main`` returning one flat tuple: its outputs, then the taps; or the taps alone, and nothing else computed."""
    main = mod["main"]
    bindings = [binding for block in main.body.blocks for binding in block.bindings]
    returned = main.body.body
    bound = {binding.var: binding.value for binding in bindings}
    if not with_outputs:
        outputs = []
    elif isinstance(returned, relax.Tuple):
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
    return tapped if with_outputs else relax.transform.DeadCodeElimination(["main"])(tapped)
