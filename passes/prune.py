"""A compiler pass that makes weights zero, by any method that ``prune_spec`` names; the network keeps its shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tvm
from tvm.ir import IRModule

from pumice.errors import ModelError, UsageError
from pumice.module import source_of, weights_of, with_layers, with_weights
from pumice.passes.allocate import allocate
from pumice.passes.dataflow import Dataflow
from pumice.passes.layers import Layer, find_layers
from pumice.passes.prune_rows import prune_rows
from pumice.passes.prune_spec import Magnitude, NearZero, PruneSpec, Surgeon, Wanda, check_globs, parse_prune
from pumice.passes.segments import segments
from pumice.passes.sparsity import describe, is_depthwise
from pumice.passes.statistics import Moments, input_moments
from pumice.patterns import Pattern

Progress = Callable[[int, int], None]

_MOST_STAGES = 12  # each runs all samples through the network once more


@tvm.transform.module_pass(opt_level=0, name="pumice.Prune")
class Prune:
    """``w -> w'`` with as many zeros, in the pattern, as the specification says; see ``prune_spec`` for the methods.

    With an amount, ``round(amount * units)`` units are zero afterwards, of each layer or spread by the allocation; what
    is zero already counts, and stays zero. Of equals the first goes. Where a channel count is no multiple of the
    block, the last block is shorter. int8 weights are compared by the value that they stand for.

    ``samples`` (as for ``Calibrate``) are what wanda, sparsegpt, obc and the allocation ``sensitivity`` look at. These
    prune block by block of the network, each on what the pruned blocks before it give; ``progress(done, total)`` hears
    of each sample that was run.

    Left alone, with the reason in the layer's notes: layers that ``keep`` or ``only`` exclude, depthwise convolutions
    when the pattern needs neighbouring input channels, and layers whose inputs or float weights a method needs and does
    not have. Raises UsageError where ``keep`` or ``only`` names no layer or samples are missing, ModelError for a
    weight that is not finite.
    """

    def __init__(
        self,
        spec: PruneSpec | str,
        samples: Mapping[str, np.ndarray] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Raises UsageError for a specification that is none, or one that takes out whole channels."""
        self.spec = parse_prune(spec) if isinstance(spec, str) else spec
        if not isinstance(self.spec, Magnitude | NearZero | Wanda | Surgeon):
            raise UsageError(f"{self.spec} changes the network's shape, which Prune does not")
        self.samples = samples
        self.progress = progress

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Prune, and record for each layer what happened."""
        spec = self.spec
        weights = weights_of(mod)
        layers = [layer for layer in find_layers(mod) if layer.weight.name in weights]
        notes = _left_alone(mod, layers, spec)
        # A weight that two layers share is pruned once, and not at all if one of them keeps it.
        kept = {layer.weight.name for layer in layers if layer.name in notes}
        chosen = {layer.weight.name: layer for layer in layers if layer.weight.name not in kept}
        before = describe(mod)
        if needs_samples(spec) and chosen and self.samples is None:
            raise UsageError(
                f"{source_of(mod)}: {spec} looks at the inputs of each layer, so it needs calibration data; give some, "
                "or prune by magnitude"
            )
        pruned = _prune(mod, list(chosen.values()), spec, self.samples, self.progress)
        changed = {name for name in chosen if not np.array_equal(weights[name], weights_of(pruned)[name])}
        records = describe(with_layers(pruned, before))
        for layer in layers:
            record = records[layer.name]
            if layer.weight.name in changed:
                earlier = before[layer.name].pruned_by
                record.pruned_by = f"{earlier}, then {spec}" if earlier else str(spec)
            if layer.name in notes and notes[layer.name] not in record.notes:
                record.notes.append(notes[layer.name])
        return with_layers(pruned, records)


def needs_samples(spec: PruneSpec) -> bool:
    """Whether a specification that ``Prune`` takes cannot be carried out without calibration data."""
    return isinstance(spec, Wanda | Surgeon) or (isinstance(spec, Magnitude) and spec.allocation == "sensitivity")


def _left_alone(mod: IRModule, layers: list[Layer], spec: PruneSpec) -> dict[str, str]:
    """Why each layer that is left alone is."""
    check_globs(spec, [(layer.name, layer.weight.name) for layer in layers], source_of(mod))
    computed = Dataflow(mod).activations
    pattern = getattr(spec, "pattern", Pattern())
    notes = {}
    for layer in layers:
        kept_by = spec.keeps(layer.name, layer.weight.name)
        if kept_by is not None:
            notes[layer.name] = f"not pruned: {kept_by}"
        elif pattern.needs_neighbours and is_depthwise(layer):
            notes[layer.name] = (
                f"not pruned: depthwise, each output channel reads one input channel, so there is no {pattern}"
            )
        elif needs_samples(spec) and layer.data not in computed:
            notes[layer.name] = f"not pruned: its data is a constant, of which {spec.method} has no samples"
        elif isinstance(spec, Surgeon) and layer.weight_scale is not None:
            notes[layer.name] = (
                f"not pruned: its weight is int8 already, and {spec.method} changes the weights that are left"
            )
    return notes


def _prune(
    mod: IRModule,
    layers: list[Layer],
    spec: PruneSpec,
    samples: Mapping[str, np.ndarray] | None,
    progress: Progress | None,
) -> IRModule:
    """``mod`` with the weights of ``layers`` pruned."""
    values = {layer.name: _values(layer, mod) for layer in layers}
    if isinstance(spec, NearZero) or not needs_samples(spec) or samples is None:
        amounts = {} if isinstance(spec, NearZero) else allocate(spec, values, {})  # type: ignore[arg-type]
        return _with_pruned(mod, layers, values, spec, amounts, {})
    moments: dict[str, Moments] = {}
    if spec.allocation in ("global", "sensitivity"):  # type: ignore[attr-defined]
        moments = input_moments(mod, samples, layers, progress=progress)
    amounts = allocate(spec, values, moments)  # type: ignore[arg-type]
    if isinstance(spec, Magnitude):
        return _with_pruned(mod, layers, values, spec, amounts, {})
    for stage in _stages(mod, layers):
        now = [layer for layer in find_layers(mod) if layer.name in stage]
        found = input_moments(mod, samples, now, progress=progress)
        mod = _with_pruned(mod, now, values, spec, amounts, found)
    return mod


def _stages(mod: IRModule, layers: Sequence[Layer]) -> list[set[str]]:
    """The layers to prune, by name, block by block of the network; in a deep one, several blocks at once."""
    names = {layer.name for layer in layers}
    cut = segments(mod, least=math.ceil(len(find_layers(mod)) / _MOST_STAGES))
    stages = [{layer.name for layer in segment.layers} & names for segment in cut]
    return [stage for stage in stages if stage]


def _with_pruned(
    mod: IRModule,
    layers: list[Layer],
    values: Mapping[str, np.ndarray],
    spec: PruneSpec,
    amounts: Mapping[str, float],
    moments: Mapping[str, Moments],
) -> IRModule:
    weights = dict(weights_of(mod))
    for layer in layers:
        stored = layer.to_rows(weights[layer.weight.name])
        pruned = prune_rows(values[layer.name], spec, amounts.get(layer.name, 0.0), moments.get(layer.name))
        if pruned.dtype != stored.dtype or not isinstance(spec, Surgeon):
            pruned = np.where(pruned == 0, np.zeros((), stored.dtype), stored)  # int8 stays int8
        if not np.array_equal(pruned, stored):
            weights[layer.weight.name] = layer.from_rows(pruned)
    return with_weights(mod, weights)


def _values(layer: Layer, mod: IRModule) -> np.ndarray:
    """The weight's real values as rows; raises ModelError where one is not finite."""
    weights = weights_of(mod)
    rows = layer.to_rows(weights[layer.weight.name])
    if not np.issubdtype(rows.dtype, np.floating):
        rows = rows.astype(np.float32)
        scale = layer.weight_scale
        name = scale.name if isinstance(scale, tvm.relax.Var) else None
        if name in weights:
            rows = rows * weights[name].reshape(-1, 1, 1)
    if not np.isfinite(rows).all():
        raise ModelError(
            f"{source_of(mod)}: the weight {layer.weight.name} has values that are not finite, which have no "
            "magnitude to prune by; the checkpoint is damaged"
        )
    return rows
