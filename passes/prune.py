"""A compiler pass that prunes weights by magnitude: the smallest blocks become zero."""

from __future__ import annotations

from fnmatch import fnmatchcase

import numpy as np
import tvm
from tvm.ir import IRModule

from pumice.errors import ModelError, UsageError
from pumice.module import source_of, weights_of, with_layers, with_weights
from pumice.passes.layers import Layer, find_layers
from pumice.passes.prune_spec import BLOCKS, PruneSpec
from pumice.passes.sparsity import describe, is_depthwise


@tvm.transform.module_pass(opt_level=0, name="pumice.Prune")
class Prune:
    """``w -> w`` with its smallest blocks zero, as many as ``PruneSpec`` says (Han et al., arXiv:1506.02626).

    With an amount, ``round(amount * blocks)`` blocks are zero afterwards, of each layer or of all together; what
    is zero already counts, and stays zero. With N:M, the N largest of any M neighbouring input channels stay
    (Mishra et al., arXiv:2104.08378). Of equals the first goes. Where a channel count is no multiple of the
    block, the last block is shorter. int8 weights are compared by the value that they stand for.

    Left alone, with the reason in the layer's notes: layers that ``keep`` names, and depthwise convolutions when
    the pattern needs neighbouring input channels. Raises UsageError where ``keep`` names no layer, ModelError for
    a weight that is not finite.
    """

    def __init__(self, spec: PruneSpec | str) -> None:
        self.spec = PruneSpec.parse(spec) if isinstance(spec, str) else spec

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Prune, and record for each layer what happened."""
        weights = dict(weights_of(mod))
        layers = [layer for layer in find_layers(mod) if layer.weight.name in weights]
        notes = _kept_layers(layers, self.spec, source_of(mod))
        # A weight that two layers share is pruned once, and not at all if one of them keeps it.
        kept = {layer.weight.name for layer in layers if layer.name in notes}
        chosen = {layer.weight.name: layer for layer in layers if layer.weight.name not in kept}
        before = describe(mod)
        pruned = _pruned({name: (layer, _values(layer, weights, mod)) for name, layer in chosen.items()}, self.spec)
        changed = set()
        for name, zero in pruned.items():
            rows = chosen[name].to_rows(weights[name])
            if (rows[zero] != 0).any():
                weights[name] = chosen[name].from_rows(np.where(zero, np.zeros((), rows.dtype), rows))
                changed.add(name)
        mod = with_weights(mod, weights)
        records = describe(with_layers(mod, before))
        for layer in layers:
            record = records[layer.name]
            if layer.weight.name in changed:
                earlier = before[layer.name].pruned_by
                record.pruned_by = f"{earlier}, then {self.spec}" if earlier else str(self.spec)
            if layer.name in notes and notes[layer.name] not in record.notes:
                record.notes.append(notes[layer.name])
        return with_layers(mod, records)


def _kept_layers(layers: list[Layer], spec: PruneSpec, source: str) -> dict[str, str]:
    """Why each layer that is left alone is."""
    for glob in spec.keep:
        if not any(fnmatchcase(name, glob) for layer in layers for name in (layer.name, layer.weight.name)):
            names = ", ".join(layer.name for layer in layers[:8])
            raise UsageError(f"keep={glob} names no layer of {source}; its layers are {names}, ...")
    notes = {}
    needs_neighbours = spec.group is not None or BLOCKS[spec.pattern][1] > 1
    for layer in layers:
        kept_by = spec.keeps(layer.name, layer.weight.name)
        if kept_by is not None:
            notes[layer.name] = f"not pruned: keep={kept_by}"
        elif needs_neighbours and is_depthwise(layer):
            notes[layer.name] = (
                f"not pruned: depthwise, each output channel reads one input channel, so there is no {spec.pattern}"
            )
    return notes


def _values(layer: Layer, weights: dict[str, np.ndarray], mod: IRModule) -> np.ndarray:
    """The weight's real values as rows; raises ModelError where one is not finite."""
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


def _pruned(values: dict[str, tuple[Layer, np.ndarray]], spec: PruneSpec) -> dict[str, np.ndarray]:
    """Which weights are to be zero, by weight, as rows of booleans."""
    if spec.group is not None:
        return {name: _group_zeros(rows, *spec.group) for name, (_, rows) in values.items()}
    height, width = BLOCKS[spec.pattern]
    scores = {name: _block_scores(rows, height, width, spec.norm) for name, (_, rows) in values.items()}
    if spec.everywhere and scores:
        chosen = _smallest(np.concatenate([s.ravel() for s in scores.values()]), spec.amount)
        ends = np.cumsum([s.size for s in scores.values()])
        parts = np.split(chosen, ends[:-1])
    else:
        parts = [_smallest(s.ravel(), spec.amount) for s in scores.values()]
    zeros = {}
    for (name, score), part in zip(scores.items(), parts, strict=True):
        n, _, c = values[name][1].shape
        blocks = part.reshape(score.shape)
        zeros[name] = blocks.repeat(height, axis=0).repeat(width, axis=2)[:n, :, :c]
    return zeros


def _block_scores(rows: np.ndarray, height: int, width: int, norm: str) -> np.ndarray:
    """The norm of each block, ``[ceil(N / height), taps, ceil(C / width)]``: what the model loses with it."""
    score = np.abs(rows).astype(np.float64)
    if norm == "l2":
        score = score**2  # of sums only the order counts, and the root would not change it
    score = np.add.reduceat(score, np.arange(0, score.shape[0], height), axis=0) if height > 1 else score
    return np.asarray(np.add.reduceat(score, np.arange(0, score.shape[2], width), axis=2) if width > 1 else score)


def _smallest(scores: np.ndarray, amount: float) -> np.ndarray:
    """Which ``round(amount * size)`` scores are smallest; of equals the first, on every machine."""
    count = round(amount * scores.size)
    if count == 0:
        return np.zeros(scores.shape, bool)
    limit = np.partition(scores, count - 1)[count - 1]
    chosen: np.ndarray = scores < limit
    chosen[np.flatnonzero(scores == limit)[: count - int(chosen.sum())]] = True
    return chosen


def _group_zeros(rows: np.ndarray, n: int, m: int) -> np.ndarray:
    """All but the N largest of each M neighbours; a last group that is shorter keeps N too."""
    channels = rows.shape[2]
    # Padding smaller than any weight goes first.
    short = -channels % m
    padded = np.pad(np.abs(rows), ((0, 0), (0, 0), (0, short)), constant_values=-1)
    groups = padded.reshape(*rows.shape[:2], -1, m)
    order = np.argsort(groups, axis=-1, kind="stable")
    zero = np.zeros(groups.shape, bool)
    np.put_along_axis(zero, order[..., : m - n], True, axis=-1)
    return zero.reshape(*rows.shape[:2], -1)[:, :, :channels]
