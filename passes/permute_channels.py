"""A pass that puts channels in the order in which pruning costs the least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tvm
from tvm.ir import IRModule

from pumice.errors import ModelError, UsageError
from pumice.module import source_of, weights_of, with_layers
from pumice.passes.allocate import allocate
from pumice.passes.channel_groups import find_channel_groups, permuted
from pumice.passes.channel_order import find_order
from pumice.passes.channel_views import INPUTS, OUTPUTS, Bundle, ScoredLayer, Spec, bundles_of, score, score_mask
from pumice.passes.layers import Layer, find_layers
from pumice.passes.prune import needs_samples
from pumice.passes.prune_spec import Magnitude, NearZero, PruneSpec, Surgeon, Wanda, check_globs, parse_prune
from pumice.passes.source_order import source_orders_of, with_source_orders
from pumice.passes.sparsity import describe, is_depthwise
from pumice.passes.statistics import Moments, input_moments
from pumice.patterns import Pattern

_WORDS = {frozenset({INPUTS}): "input channels", frozenset({OUTPUTS}): "output channels"}


@tvm.transform.module_pass(opt_level=0, name="PermuteChannels")
class PermuteChannels:
    """``matmul(relu(matmul(x, w)), v)`` -> ``matmul(relu(matmul(x, w[:, order])), v[order])``.

    What the model computes stays the same, up to the order in which floats are summed up. Every group of channels
    whose order is free (``find_channel_groups``) gets the one in which pruning by ``specs`` keeps the largest sum of
    scores, or in which the weights that stay anyway lie in the fewest blocks; see ``channel_order`` for the search.
    The specifications are those of ``Prune`` that come next, the last one that does not leave a layer alone counting
    for it. Without any, the zeros that are there stay what they are, and are gathered in as many empty blocks of
    ``pattern`` as possible: so an unstructured mask needs fewer blocks.

    ``samples`` (as for ``Calibrate``) are needed where a specification needs them. ``outputs`` says whether channels
    that the model gives out may be permuted; a ``take`` then puts the output in order again at run time. ``rounds``
    and ``seed`` are the search's: the same numbers give the same order.

    The notes of a layer say what was gained; ``source_orders_of`` has where each channel was. Raises UsageError for
    specifications that prune no pattern, without samples that are needed, or where ``keep`` or ``only`` names no
    layer; ModelError for a weight that is not finite.
    """

    def __init__(
        self,
        specs: str | PruneSpec | Sequence[str | PruneSpec] = (),
        samples: Mapping[str, np.ndarray] | None = None,
        *,
        pattern: Pattern | str | None = None,
        outputs: bool = True,
        rounds: int = 300,
        seed: int = 0,
    ) -> None:
        several = [specs] if isinstance(specs, str | PruneSpec) else specs
        self.specs = [_checked(parse_prune(spec) if isinstance(spec, str) else spec) for spec in several]
        self.pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
        if bool(self.specs) == (self.pattern is not None):
            raise UsageError("channels are permuted for prune specifications, or for a pattern that zeros are to fill")
        if self.pattern is not None and (self.pattern.group is not None or self.pattern == Pattern()):
            raise UsageError(f"zeros are gathered in blocks, such as 1x4; {self.pattern} has none")
        self.samples = samples
        self.outputs = outputs
        self.rounds = rounds
        self.seed = seed

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Find an order for each bundle of groups, and keep it if all its layers together gain."""
        layers = {layer.weight.name: layer for layer in find_layers(mod)}
        before = scored = self._scored(mod)
        free = [group for group in find_channel_groups(mod) if group.fixed is None and group.kind != "heads"]
        changed: dict[str, set[int]] = {}
        for bundle in bundles_of([group for group in free if self.outputs or not group.outputs]):
            views = bundle.views(scored)
            if not views:
                continue
            order = find_order(views, bundle.parts, rounds=self.rounds, seed=self.seed)
            after = _moved(scored, bundle, order, layers)
            if sum(each.kept() - scored[name].kept() for name, each in after.items()) > 0:
                mod, scored = _applied(mod, bundle, order, layers), {**scored, **after}
                for weight, axis, _ in bundle.moves(order, layers):
                    changed.setdefault(weight, set()).add(axis)
        records = describe(mod)
        for name, layer in layers.items():
            if name in scored and (axes := _counted_axes(scored[name], changed.get(name, set()))):
                records[layer.name].notes.append(_note(before[name], scored[name], axes))
        return with_layers(mod, records)

    def _scored(self, mod: IRModule) -> dict[str, ScoredLayer]:
        """The layers whose pruning the order matters to, by weight name."""
        weights = weights_of(mod)
        layers = [layer for layer in find_layers(mod) if weights[layer.weight.name].dtype == np.float32]
        rows = {layer.name: _finite_rows(layer, weights, mod) for layer in layers}
        if self.pattern is not None:
            masks = {layer.weight.name: (layer, rows[layer.name] != 0) for layer in layers}
            return {name: score_mask(*each, self.pattern) for name, each in masks.items() if not each[1].all()}
        for spec in self.specs:
            check_globs(spec, [(layer.name, layer.weight.name) for layer in layers], source_of(mod))
        scored: dict[str, ScoredLayer] = {}
        for spec in self.specs:
            chosen = [layer for layer in layers if _prunes(spec, layer, layers)]
            moments = self._moments(mod, spec, chosen)
            values = {layer.name: rows[layer.name] for layer in chosen}
            amounts = {} if isinstance(spec, NearZero) else allocate(spec, values, moments)
            for layer in chosen:
                amount = amounts.get(layer.name, 0.0)
                scored[layer.weight.name] = score(layer, rows[layer.name], spec, amount, moments.get(layer.name))
        return scored

    def _moments(self, mod: IRModule, spec: Spec, layers: list[Layer]) -> dict[str, Moments]:
        if not needs_samples(spec) or not layers:
            return {}
        if self.samples is None:
            raise UsageError(
                f"{source_of(mod)}: {spec} looks at the inputs of each layer, so permuting channels for it needs "
                "calibration data; give some, or prune by magnitude"
            )
        return input_moments(mod, self.samples, layers)


def fixed_layers(mod: IRModule) -> dict[str, str]:
    """Why the input channels of a layer cannot be permuted, by layer name, where they cannot."""
    layers = {layer.weight.name: layer.name for layer in find_layers(mod)}
    return {
        layers[slot.weight]: group.fixed
        for group in find_channel_groups(mod)
        if group.fixed is not None and group.kind != "heads"
        for slot in group.slots_of("consumer")
        if slot.weight in layers
    }


def _checked(spec: PruneSpec) -> Spec:
    if not isinstance(spec, Magnitude | NearZero | Wanda | Surgeon):
        raise UsageError(f"{spec} takes whole channels out, so their order is nothing to it; give other specifications")
    return spec


def _prunes(spec: Spec, layer: Layer, layers: Sequence[Layer]) -> bool:
    """Whether ``Prune`` would prune the layer, in all the places where its weight is used."""
    if spec.pattern.needs_neighbours and is_depthwise(layer):
        return False
    sharing = [each for each in layers if each.weight.same_as(layer.weight)]
    return all(spec.keeps(each.name, each.weight.name) is None for each in sharing)


def _finite_rows(layer: Layer, weights: Mapping[str, np.ndarray], mod: IRModule) -> np.ndarray:
    rows = layer.to_rows(weights[layer.weight.name])
    if not np.isfinite(rows).all():
        raise ModelError(
            f"{source_of(mod)}: the weight {layer.weight.name} has values that are not finite, which have no "
            "magnitude to order by; the checkpoint is damaged"
        )
    return rows


def _moved(
    scored: Mapping[str, ScoredLayer], bundle: Bundle, order: np.ndarray, layers: Mapping[str, Layer]
) -> dict[str, ScoredLayer]:
    """The layers that an order of the bundle's channels concerns, with their scores as they then lie."""
    after: dict[str, ScoredLayer] = {}
    for weight, axis, indices in bundle.moves(order, layers):
        if weight in scored and scored[weight].rule(axis) is not None:
            after[weight] = after.get(weight, scored[weight]).moved(axis, indices)
    return after


def _applied(mod: IRModule, bundle: Bundle, order: np.ndarray, layers: Mapping[str, Layer]) -> IRModule:
    for group, own in zip(bundle.groups, bundle.orders(order), strict=True):
        mod = permuted(mod, group, own)
    orders = source_orders_of(mod)
    for weight, axis, indices in bundle.moves(order, layers):
        known = orders.setdefault(weight, {})
        known[axis] = known.get(axis, np.arange(len(indices)))[indices]
    return with_source_orders(mod, orders)


def _counted_axes(scored: ScoredLayer, axes: set[int]) -> frozenset[int]:
    """Those of the axes whose order matters to the pattern."""
    return frozenset(axis for axis in axes if scored.rule(axis) is not None)


def _note(before: ScoredLayer, after: ScoredLayer, axes: frozenset[int]) -> str:
    what = _WORDS.get(axes, "input and output channels")
    if after.counted:
        blocks = after.pattern.unit_scores(after.scores).size
        filled, earlier = (round((1 - each.kept()) * blocks) for each in (after, before))
        return (
            f"{what} reordered: what stays lies in {filled} of its {blocks} {after.pattern} blocks, "
            f"in {earlier} in the order of the source"
        )
    blocks_keep = f"its {after.pattern} blocks keep" if after.pattern.group is None else f"{after.pattern} keeps"
    at = f" at {after.amount:.0%}" if after.pattern.group is None else ""
    return (
        f"{what} reordered: {blocks_keep} {after.kept():.1%} of the scores{at}, "
        f"{before.kept():.1%} in the order of the source"
    )
