"""A pass that tells where each layer's own error comes from: pruning, rounding its weight, rounding its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from math import ceil

import numpy as np
import tvm
from tvm.ir import IRModule

from pumice.module import layers_of, weights_of, with_layers
from pumice.passes.calibrate import Affine, Samples
from pumice.passes.dataflow import Dataflow
from pumice.passes.evaluate import SharedEvaluator
from pumice.passes.layer_error import decibels
from pumice.passes.layers import Layer, find_layers
from pumice.passes.padding import real_positions, token_mask
from pumice.passes.rewriting import array_of, shape_of
from pumice.passes.rounding import dequantized_weight, rounded_tensor
from pumice.passes.smooth_activations import find_smoothable
from pumice.passes.statistics import unfold
from pumice.record import LayerRecord

_WORST = 5  # layers that get a sentence
_HARMLESS = 0.01  # noise over signal, -20 dB: below it no layer is called an offender
_POSITIONS = 4096  # of a picture that are looked at
_MARK = "its own error is "  # how the sentence begins
_CAUSES = {"pruning": "pruning", "weights": "rounding its weight", "activations": "rounding its input"}


@tvm.transform.module_pass(opt_level=0, name="SplitErrors")
class SplitErrors:
    """Write into each layer's record what one step of the road did to its output: ``noise``, by cause.

    ``before`` is the module before the step, with the same layers; the pass runs on the module after it. With ``X`` a
    layer's input in ``before``, and ``W`` its weight there:

    - after pruning (the layer is still float, with weight ``P``): ``pruning = |(W - P) X|^2 / |W X|^2``
    - after quantizing (``Q`` its rounded weight, ``R`` its rounded input): ``weights = |(W - Q) X|^2 / |W X|^2`` and
      ``activations = |Q (X - R)|^2 / |W X|^2``

    Errors of layers before are not in ``X``, so this is the layer's own share; biases are in neither noise nor signal.
    The two roundings are nearly independent, so that their sum is the noise of both. Padding tokens do not count.

    The up to five layers with the most noise, of those with 1 % or more, get a sentence in their notes: what most of it
    comes from, and which option undoes it. At most ``limit`` samples, evenly spread, are run; ``evaluator`` is what
    other passes run ``before`` with. Raises ModelError where the samples do not fit the model.
    """

    def __init__(
        self,
        before: IRModule,
        samples: Mapping[str, np.ndarray],
        limit: int = 16,
        evaluator: SharedEvaluator | None = None,
    ) -> None:
        self.before = before
        self.samples = samples
        self.limit = limit
        self.evaluator = evaluator or SharedEvaluator()

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Run the samples, measure, record."""
        records = layers_of(mod)
        splits = [split for split in _splits(self.before, mod) if split.layer.name in records]
        if not splits:
            return mod
        self._measure(splits)
        for split in splits:
            records[split.layer.name].noise.update(split.ratios())
        smoothable = {r.name for one in find_smoothable(self.before, Dataflow(self.before)) for r in one.readers}
        _tell_worst(records, smoothable)
        return with_layers(mod, records)

    def _measure(self, splits: list[_Split]) -> None:
        tensors = list(dict.fromkeys(split.layer.data for split in splits))
        evaluator, mask = self.evaluator.of(self.before, tensors), token_mask(self.before)
        samples = Samples(self.before, self.samples)
        for sample in islice(samples, 0, None, ceil(len(samples) / self.limit)):
            values = dict(zip(tensors, evaluator.observe(sample, tensors), strict=True))
            real = None if mask is None else np.asarray(sample[mask], bool)
            for split in splits:
                split.add(values[split.layer.data], real)


@dataclass
class _Split:
    """One layer: its weight before, each cause's change to it, and the energies at its output so far."""

    layer: Layer
    weight: np.ndarray  # rows [N, taps, C], as all weights here
    changed: dict[str, np.ndarray]  # cause -> what is missing in the weight now
    affine: Affine | None = None  # what the input is rounded by
    rounded: np.ndarray | None = None  # the weight that reads the rounded input
    signal: float = 0.0
    noise: dict[str, float] | None = None

    def add(self, value: np.ndarray, real: np.ndarray | None) -> None:
        """Take in the layer's input for one sample."""
        self.noise = self.noise or dict.fromkeys([*self.changed, *(["activations"] if self.affine else [])], 0.0)
        columns = self._columns(value, real)
        self.signal += self._energy(columns, self.weight)
        for cause, rows in self.changed.items():
            self.noise[cause] += self._energy(columns, rows)
        if self.affine is not None and self.rounded is not None:
            error = columns - rounded_tensor(columns, self.affine)
            self.noise["activations"] += self._energy(error, self.rounded)

    def ratios(self) -> dict[str, float]:
        """Noise over signal by cause; 0 for a layer without any signal."""
        noise = self.noise or {}
        return {cause: energy / self.signal if self.signal > 0 else 0.0 for cause, energy in noise.items()}

    def _columns(self, value: np.ndarray, real: np.ndarray | None) -> np.ndarray:
        """``[groups, positions, K]``: what an output position reads."""
        if self.layer.operator == "linear":
            return real_positions(value, real)[None]
        return unfold(value, self.layer, int(self.layer.call.attrs.groups), _POSITIONS)

    @staticmethod
    def _energy(columns: np.ndarray, rows: np.ndarray) -> float:
        flat = rows.reshape(len(columns), -1, columns.shape[2]).astype(np.float32)
        output = columns.astype(np.float32) @ flat.transpose(0, 2, 1)
        return float(np.square(output, dtype=np.float64).sum())


def _splits(before: IRModule, mod: IRModule) -> list[_Split]:
    """The layers of both modules that the step changed."""
    graph, computed = Dataflow(mod), Dataflow(before).activations
    old, new = weights_of(before), weights_of(mod)
    now = {layer.name: layer for layer in find_layers(mod)}
    found = []
    for layer in find_layers(before):
        later = now.get(layer.name)
        if later is None or layer.weight_scale is not None or layer.data not in computed:
            continue
        if shape_of(layer.weight) != shape_of(later.weight):
            continue
        weight = old[layer.weight.name].astype(np.float64)
        if later.weight_scale is None:
            pruned = new[later.weight.name]
            if not np.array_equal(pruned, old[layer.weight.name]):
                found.append(_Split(layer, layer.to_rows(weight), {"pruning": layer.to_rows(weight - pruned)}))
        elif graph.op(later.data) == "dequantize":
            scale, zero_point = (array_of(operand, new) for operand in graph.value[later.data].args[1:3])
            stored = dequantized_weight(later, new[later.weight.name], array_of(later.weight_scale, new))
            affine = Affine(float(scale.reshape(())), int(zero_point.reshape(())))
            changed = {"weights": layer.to_rows(weight - stored)}
            found.append(_Split(layer, layer.to_rows(weight), changed, affine, layer.to_rows(stored)))
    return found


def _tell_worst(records: Mapping[str, LayerRecord], smoothable: set[str]) -> None:
    """Give the worst layers their sentence, and take it from those that had one."""
    for record in records.values():
        record.notes = [note for note in record.notes if not note.startswith(_MARK)]
    noisy = [record for record in records.values() if sum(record.noise.values()) >= _HARMLESS]
    for record in sorted(noisy, key=lambda record: -sum(record.noise.values()))[:_WORST]:
        cause = max(record.noise, key=record.noise.__getitem__)
        total = decibels(1.0, sum(record.noise.values()))
        undone = _undone_by(cause, record, record.name in smoothable)
        record.notes.append(f"{_MARK}{-total:.1f} dB of its output, most of it from {_CAUSES[cause]}: {undone}")


def _undone_by(cause: str, record: LayerRecord, is_smoothable: bool) -> str:
    if cause == "pruning":
        return f"keep={record.name} or a lower amount of pruning undoes it"
    if cause == "weights":
        return f"--rounding gptq lessens it, --keep-float {record.name} undoes it"
    smoothed = any(note.startswith("input smoothed") for note in record.notes)
    lessened = "--smooth lessens it, " if is_smoothable and not smoothed else ""
    return f"{lessened}--keep-float {record.name} undoes it"
