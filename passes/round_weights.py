"""A pass that rounds weights to int8 so that those rounded later make up for the errors of those before."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import tvm
from tvm.ir import IRModule

from pumice.module import layers_of, weights_of, with_layers, with_weights
from pumice.passes.brain_surgeon import damped, round_columns
from pumice.passes.layers import Layer, find_layers
from pumice.passes.quantization_plan import (
    QuantizeSpec,
    plan_quantization,
    symmetric_scale,
    weight_scales_of,
    with_weight_scales,
)
from pumice.passes.segments import segments
from pumice.passes.statistics import Moments, input_moments

_DAMPING = 0.01  # of the paper


@tvm.transform.module_pass(opt_level=0, name="pumice.RoundWeights")
class RoundWeights:
    """GPTQ: the weights of the layers that ``Quantize`` will turn to int8, rounded with regard to their inputs.

    ``w -> q * s`` with whole ``q`` in [-127, 127] and ``s = max|w| / 127`` for each output channel; what rounding a
    column does to the output, the columns after it make up for, as far as they can. Weights that are zero stay zero, so
    behind SparseGPT this is its joint form (section 3.5 there). The scales are kept for ``Quantize``, which finds the
    very integers. Block by block, each on what the rounded blocks before it give.

    ``samples`` are as for ``Calibrate``. Source: Frantar et al., GPTQ (arXiv:2210.17323).
    """

    def __init__(
        self,
        samples: Mapping[str, np.ndarray],
        spec: QuantizeSpec | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.samples = samples
        self.spec = spec or QuantizeSpec()
        self.progress = progress

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Round. Raises ModelError where the samples do not fit the model."""
        names = {layer.name for layer in plan_quantization(mod, self.spec).layers}
        shared = _shared_weights(mod)
        for segment in segments(mod):
            here = {layer.name for layer in segment.layers if layer.name in names and layer.weight.name not in shared}
            layers = [layer for layer in find_layers(mod) if layer.name in here]
            if layers:
                moments = input_moments(mod, self.samples, layers, progress=self.progress)
                mod = _rounded(mod, layers, moments)
        records = layers_of(mod)
        for layer in find_layers(mod):
            if layer.name in names and layer.name in records and layer.weight.name in shared:
                records[layer.name].notes.append("rounded to nearest: several layers share its weight")
        return with_layers(mod, records)


def _shared_weights(mod: IRModule) -> set[str]:
    """Weights that several layers read, each with inputs of its own."""
    readers: dict[str, int] = {}
    for layer in find_layers(mod):
        readers[layer.weight.name] = readers.get(layer.weight.name, 0) + 1
    return {name for name, count in readers.items() if count > 1}


def _rounded(mod: IRModule, layers: list[Layer], moments: Mapping[str, Moments]) -> IRModule:
    weights, scales = dict(weights_of(mod)), dict(weight_scales_of(mod))
    for layer in layers:
        weight = weights[layer.weight.name]
        scale = symmetric_scale(layer, weight)
        weights[layer.weight.name] = layer.from_rows(_round_rows(layer.to_rows(weight), scale, moments[layer.name]))
        scales[layer.weight.name] = scale
    return with_weight_scales(with_weights(mod, weights), scales)


def _round_rows(rows: np.ndarray, scale: np.ndarray, moments: Moments) -> np.ndarray:
    """``rows [N, taps, C]`` on the grid of ``scale [N]``, float32."""
    parts = []
    for gram, part, steps in zip(
        moments.gram, np.split(rows, len(moments.gram)), np.split(scale, len(moments.gram)), strict=True
    ):
        whole = round_columns(part.reshape(len(part), -1), damped(gram, _DAMPING), steps.astype(np.float64))
        parts.append((whole * steps[:, None]).reshape(part.shape))
    return np.concatenate(parts).astype(np.float32)
