"""Choosing the layers that stay float32 under a budget: those whose rounding does the most harm for what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import tvm
from tvm.ir import IRModule

from pumice.passes.calibrate import Calibrate
from pumice.passes.correct_bias import CorrectBias
from pumice.passes.evaluate import SharedEvaluator
from pumice.passes.layer_error import decibels
from pumice.passes.layers import Layer, find_layers
from pumice.passes.quantization_plan import QuantizeSpec
from pumice.passes.quantize import Quantize
from pumice.passes.sensitivity import output_noise

_NEGLIGIBLE = 0.005  # share of all noise: a layer with less is not worth being slow


def within_budget(
    mod: IRModule,
    samples: Mapping[str, np.ndarray],
    budget: float,
    spec: QuantizeSpec | None = None,
    method: str = "minmax",
    correct_bias: bool = True,
    limit: int = 16,
    progress: Callable[[int, int], None] | None = None,
    evaluator: SharedEvaluator | None = None,
) -> QuantizeSpec:
    """``spec`` with more layers kept float: the most harmful ones, up to ``budget`` of all multiply-adds.

    ``mod`` is the float module that is going to be quantized. It is quantized once as a whole, calibrated by ``method``
    and with its biases corrected if so, and ``output_noise`` tells what each layer's rounding does to the outputs, on
    at most ``limit`` samples. Layers that ``spec`` keeps float already do not count. Raises what those do.
    """
    spec = spec or QuantizeSpec()
    layers = find_layers(mod)
    total = sum(layer.macs for layer in layers)
    if budget <= 0 or total == 0:
        return spec
    steps = [Calibrate(samples, method, spec, evaluator=evaluator), Quantize(spec)]
    if correct_bias:
        steps.append(CorrectBias(mod, samples, evaluator=evaluator))
    noise = output_noise(mod, tvm.transform.Sequential(steps)(mod), samples, limit, progress)
    costs = {layer.name: layer.macs / total for layer in layers if layer.name in noise}
    chosen = choose_float(_by_weight(layers, noise), _by_weight(layers, costs), budget)
    return replace(spec, reasons={**spec.reasons, **chosen})


def _by_weight(layers: Sequence[Layer], values: Mapping[str, float]) -> dict[str, float]:
    """The sums over layers that share a weight, by the first of them: where one of them stays float, all do."""
    first: dict[str, str] = {}
    found: dict[str, float] = {}
    for layer in layers:
        if layer.name in values:
            name = first.setdefault(str(layer.weight.name), layer.name)
            found[name] = found.get(name, 0.0) + values[layer.name]
    return found


def choose_float(noise: Mapping[str, float], costs: Mapping[str, float], budget: float) -> dict[str, str]:
    """The layers to keep float, most harmful first, and the reason that its record gives for each.

    ``noise`` is each layer's share of noise at the outputs, ``costs`` what keeping it float takes of the ``budget``, in
    one unit: multiply-adds, or time. Layers are taken greedily by noise for cost, as far as they fit; noises add up, so
    this is the knapsack problem, of which greed misses the optimum by less than the noise of one layer. Layers with
    less than half a per cent of all noise are left in int8 even where the budget has room.
    """
    worthwhile = [name for name in noise if noise[name] > _NEGLIGIBLE * sum(noise.values())]
    chosen, left = [], budget * (1 + 1e-9)
    for name in sorted(worthwhile, key=lambda name: noise[name] / max(costs[name], 1e-12), reverse=True):
        if costs[name] <= left:
            chosen.append(name)
            left -= costs[name]
    ranked = sorted(noise, key=noise.__getitem__, reverse=True)
    return {
        name: f"kept float by the budget: in int8 its noise is {-decibels(1.0, noise[name]):.1f} dB of the outputs', "
        f"{_rank(ranked.index(name))} of {len(noise)} layers"
        for name in sorted(chosen, key=noise.__getitem__, reverse=True)
    }


def _rank(index: int) -> str:
    return "the most" if index == 0 else f"number {index + 1}"
