"""A pass that measures what quantization cost each layer: its output against the float model's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice

import numpy as np
import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.module import layers_of, with_layers
from pumice.passes.calibrate import Samples
from pumice.passes.dataflow import Dataflow
from pumice.passes.evaluate import Evaluator, SharedEvaluator
from pumice.passes.layers import find_layers
from pumice.passes.quantization_plan import AFFINE, POINTWISE

_LIMIT_DB = 150.0  # float32 resolves no more, and JSON has no infinity


@tvm.transform.module_pass(opt_level=0, name="RecordLayerErrors")
class RecordLayerErrors:
    """Write each layer's signal-to-noise ratio into its record's ``snr_db``.

    The signal is the layer's output in ``float_mod``, after bias and activation; the noise is what the module
    given to the pass, its quantized form, differs by at the same point, rounding of the output included. So it
    is all that quantization did up to there, not the layer's own share. At most ``limit`` samples are run.
    """

    def __init__(
        self,
        float_mod: IRModule,
        samples: Mapping[str, np.ndarray],
        limit: int = 8,
        evaluator: SharedEvaluator | None = None,
    ) -> None:
        """``evaluator`` is what other passes run ``float_mod`` with."""
        self.float_mod = float_mod
        self.samples = samples
        self.limit = limit
        self.evaluator = evaluator or SharedEvaluator()

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Run both; raises ModelError where the samples do not fit the model."""
        exact, rounded = layer_results(self.float_mod), layer_results(mod)
        records = layers_of(mod)
        measured = [name for name in records if name in exact and name in rounded]
        if not measured:
            return mod
        taps = [[results[name] for name in measured] for results in (exact, rounded)]
        evaluators = self.evaluator.of(self.float_mod, taps[0]), Evaluator(mod, taps[1])
        signal, noise = np.zeros(len(measured)), np.zeros(len(measured))
        for sample in islice(Samples(mod, self.samples), self.limit):
            values = [each.observe(sample, tapped) for each, tapped in zip(evaluators, taps, strict=True)]
            for i, (reference, value) in enumerate(zip(*values, strict=True)):
                signal[i] += np.square(reference, dtype=np.float64).sum()
                noise[i] += np.square(np.subtract(reference, value, dtype=np.float64)).sum()
        for name, s, n in zip(measured, signal, noise, strict=True):
            records[name].snr_db = decibels(float(s), float(n))
        return with_layers(mod, records)


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)`` of two energies, within what float32 resolves; no noise is the upper limit."""
    if noise == 0:
        return _LIMIT_DB
    if signal == 0:
        return -_LIMIT_DB
    return max(-_LIMIT_DB, min(_LIMIT_DB, 10 * math.log10(signal / noise)))


def layer_results(mod: IRModule) -> dict[str, relax.Var]:
    """Each layer's output after its bias and activation, as its readers see it: dequantized where they do."""
    graph = Dataflow(mod)
    results = {}
    for layer in find_layers(mod):
        var = graph.biased(layer.var)
        after = graph.only_user(var)
        if after is not None and graph.op(after) in POINTWISE - AFFINE and graph.activation_operands(after) == [var]:
            var = after
        results[layer.name] = _dequantized(graph, var)
    return results


def _dequantized(graph: Dataflow, var: relax.Var) -> relax.Var:
    user = graph.only_user(var)
    if user is not None and graph.op(user) == "quantize":
        return next((reader for reader in graph.users[user] if graph.op(reader) == "dequantize"), var)
    return var
