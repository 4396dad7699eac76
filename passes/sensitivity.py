"""How much noise each layer's quantization alone brings to the outputs of the model, all measured with one compilation.

Beside every layer its rounded form is computed, and a switch, an input of its own, says how much of the difference is
let through:

    y = conv2d(x, w)

    ==>  y = conv2d(x, w);  n = conv2d(round(x), w_q) - y;  y' = y + switch * n

With all switches at 0 that is the float model. With one at 1 that layer alone computes in int8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from math import ceil

import numpy as np
from tvm import relax
from tvm.ir import IRModule
from tvm.relax.op import add, dequantize, multiply, quantize, subtract

from pumice.module import inputs_of, weight_vars_of, weights_of
from pumice.passes.calibrate import Affine, Samples
from pumice.passes.dataflow import Dataflow
from pumice.passes.evaluate import Evaluator
from pumice.passes.layers import Layer, find_layers
from pumice.passes.padding import real_positions, token_mask
from pumice.passes.rewriting import Rewriter, array_of, rewrite
from pumice.passes.rounding import dequantized_weight


def output_noise(
    original: IRModule,
    quantized: IRModule,
    samples: Mapping[str, np.ndarray],
    limit: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """For each layer that is float in ``original`` and int8 in ``quantized``: the noise-to-signal ratio at the outputs.

    The signal is what ``original`` computes, the noise what changes when this layer alone has its input and weight
    rounded, and its bias corrected, as in ``quantized``. Of several outputs it is the mean ratio; padding tokens do not
    count. As the noises are small and nearly independent, they add up to about that of the whole.

    ``samples`` are as for ``Calibrate``, of which at most ``limit``, evenly spread, are run, each once more than there
    are layers, in about four times the float model's time; ``progress(done, total)`` is called after each run. Raises
    ModelError where the samples do not fit the model, UnsupportedError where it cannot be run here.
    """
    changes = _changes(original, quantized)
    if not changes:
        return {}
    switches = {name: relax.Var(f"switch {name}", relax.TensorType((1,), "float32")) for name in changes}
    evaluator = Evaluator(rewrite(_with_inputs(original, list(switches.values())), _Doubler(changes, switches).visit))
    taken, mask = Samples(original, samples), token_mask(original)
    chosen = list(islice(taken, 0, None, ceil(len(taken) / limit)))
    off = {switch.name: np.zeros(1, np.float32) for switch in switches.values()}
    signal: dict[str, float] = {}
    noise: dict[str, dict[str, float]] = {name: {} for name in changes}
    for number, sample in enumerate(chosen):
        real = None if mask is None else np.asarray(sample[mask], bool)
        exact = evaluator.run({**sample, **off})
        _accumulate(signal, exact, None, real)
        for done, (name, switch) in enumerate(switches.items(), start=1):
            _accumulate(noise[name], evaluator.run({**sample, **off, switch.name: np.ones(1, np.float32)}), exact, real)
            if progress is not None:
                progress(number * len(switches) + done, len(chosen) * len(switches))
    return {name: _mean_ratio(energies, signal) for name, energies in noise.items()}


@dataclass(frozen=True)
class _Change:
    """What quantization makes of a layer: its input's rounding, its weight as float again, what its bias grows by."""

    layer: Layer
    affine: Affine
    weight: np.ndarray
    shift: np.ndarray | None  # in the bias's shape


def _changes(original: IRModule, quantized: IRModule) -> dict[str, _Change]:
    before, after = Dataflow(original), Dataflow(quantized)
    old, new = weights_of(original), weights_of(quantized)
    now = {layer.name: layer for layer in find_layers(quantized)}
    found = {}
    for layer in find_layers(original):
        later = now.get(layer.name)
        if later is None or later.weight_scale is None or layer.weight_scale is not None:
            continue
        if after.op(later.data) != "dequantize":
            continue
        scale, zero_point = (array_of(operand, new) for operand in after.value[later.data].args[1:3])
        weight = dequantized_weight(later, new[later.weight.name], array_of(later.weight_scale, new))
        affine = Affine(float(scale.reshape(())), int(zero_point.reshape(())))
        found[layer.name] = _Change(
            layer, affine, weight.astype(np.float32), _shift(_bias(before, layer, old), _bias(after, later, new))
        )
    return found


def _bias(graph: Dataflow, layer: Layer, weights: Mapping[str, np.ndarray]) -> np.ndarray | None:
    bias = graph.bias(graph.biased(layer.var), layer.var)
    return None if bias is None else array_of(bias, weights)


def _shift(before: np.ndarray | None, after: np.ndarray | None) -> np.ndarray | None:
    """What the bias grew by, None for nothing."""
    if after is None:
        return None
    shift = after if before is None else after - before
    return shift if np.any(shift) else None


def _with_inputs(mod: IRModule, added: list[relax.Var]) -> IRModule:
    """``mod`` with these inputs behind its own; nothing reads them yet."""
    main, inputs = mod["main"], inputs_of(mod)
    params = [*inputs, *added, *weight_vars_of(mod)]
    function = relax.Function(params, main.body, main.ret_ty, main.is_pure, main.attrs)
    mod = mod.clone()
    mod.update_func(mod.get_global_var("main"), function.with_attr("num_input", len(inputs) + len(added)))
    return mod


class _Doubler:
    """Puts beside each layer what its rounded form computes otherwise."""

    def __init__(self, changes: Mapping[str, _Change], switches: Mapping[str, relax.Var]) -> None:
        self.changes = {change.layer.var: (change, switches[name]) for name, change in changes.items()}
        self.rounded: dict[tuple[relax.Expr, Affine], relax.Expr] = {}

    def visit(self, rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        """The layer's result plus its noise."""
        if var not in self.changes:
            return None
        change, switch = self.changes[var]
        exact = rewriter.emit(value, "exact")
        weight = rewriter.weight(f"{change.layer.weight.name}.rounded", change.weight)
        data = self._rounded(rewriter, value.args[0], change.affine)
        rounded = rewriter.emit(relax.Call(value.op, [data, weight], value.attrs, value.ty_args), "rounded")
        noise = rewriter.emit(subtract(rounded, exact), "noise")
        if change.shift is not None:
            noise = rewriter.emit(add(noise, relax.const(change.shift, "float32")), "noise")
        return add(exact, rewriter.emit(multiply(noise, switch), "noise"))

    def _rounded(self, rewriter: Rewriter, data: relax.Expr, affine: Affine) -> relax.Expr:
        if (data, affine) not in self.rounded:
            scale = relax.const(affine.scale, "float32")
            zero_point = relax.const(np.array(affine.zero_point, np.uint8), "uint8")
            stored = rewriter.emit(quantize(data, scale, zero_point, out_dtype="uint8"), "q")
            self.rounded[data, affine] = rewriter.emit(dequantize(stored, scale, zero_point), "dq")
        return self.rounded[data, affine]


def _accumulate(
    energies: dict[str, float],
    outputs: Mapping[str, np.ndarray],
    exact: Mapping[str, np.ndarray] | None,
    real: np.ndarray | None,
) -> None:
    """Add each output's energy, less ``exact`` if that is given."""
    for name, value in outputs.items():
        difference = value if exact is None else value - exact[name]
        seen = real_positions(difference, real) if difference.ndim else difference
        energies[name] = energies.get(name, 0.0) + float(np.square(seen, dtype=np.float64).sum())


def _mean_ratio(noise: Mapping[str, float], signal: Mapping[str, float]) -> float:
    return float(np.mean([noise[name] / signal[name] if signal[name] > 0 else 0.0 for name in noise]))
