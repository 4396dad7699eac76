"""A pass that takes whole output channels out of a network, which becomes a smaller dense one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import gcd

import numpy as np
import tvm
from tvm.ir import IRModule

from pumice.errors import UsageError
from pumice.module import source_of, weights_of
from pumice.passes.channel_groups import ChannelGroup, Slot, find_channel_groups
from pumice.passes.fold_batch_norm import norm_scales_of
from pumice.passes.layers import Layer, find_layers
from pumice.passes.prune_spec import Filters, PruneSpec, parse_prune
from pumice.passes.refit_readers import readers
from pumice.passes.remove_channels import recorded, removable, remove, writers
from pumice.passes.rewriting import shape_of
from pumice.passes.slice_channels import Removal
from pumice.passes.statistics import Moments, input_moments


@tvm.transform.module_pass(opt_level=0, name="pumice.RemoveFilters")
class RemoveFilters:
    """``z = conv2d(relu(conv2d(x, w)), v) -> z = conv2d(relu(conv2d(x, w[kept])), v[:, kept])``.

    Channels that residual adds, concats, depthwise layers and so on couple go together (``channel_groups``). Which
    ones go, ``Filters`` says; a channel counts for the sum of what it is in all layers that write it:

    - ``l1``, ``l2``: the norm of the filter's weights (Li et al., arXiv 1608.08710);
    - ``norm-scale``: ``|gamma|`` of the batch norms that were folded into them (Liu et al., arXiv 1708.06519);
    - ``activation``: its root mean square where layers read it, over the samples (after Hu et al., arXiv 1607.03250,
      who count zeros).

    Of each group ``amount`` goes; with ``everywhere`` of all groups together, where a channel is compared by its size
    relative to its group's mean. What stays is a multiple of ``multiple``, in every layer that writes the channels, and
    at least that; of a group that is smaller nothing goes.

    With ``samples``, as for ``Calibrate``, the readers make up for what is gone (see ``refit_readers``): by least
    squares, or with ``update_weights=False`` for its mean only. Without, a removed channel is as good as zero.

    Left alone, with the reason in the layers' notes: groups whose channels cannot be removed, and those with a layer
    that ``keep`` names or ``only`` does not. Raises UsageError where ``keep`` or ``only`` name no layer, for
    ``activation`` without samples, and for ``norm-scale`` where no scale is known; ModelError where the samples do not
    fit the model.
    """

    def __init__(
        self,
        spec: PruneSpec | str,
        samples: Mapping[str, np.ndarray] | None = None,
        update_weights: bool = True,
    ) -> None:
        """Raises UsageError for a specification that is not of filters."""
        parsed = parse_prune(spec) if isinstance(spec, str) else spec
        if not isinstance(parsed, Filters):
            raise UsageError(f"{parsed} removes no filters; write filters:AMOUNT, for example filters:0.3:by=l2")
        if parsed.by == "activation" and samples is None:
            raise UsageError(f"{parsed} ranks channels by their activations, so it needs calibration data")
        self.spec = parsed
        self.samples = samples
        self.update_weights = update_weights

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Choose the channels, let their readers make up for them, and remove them."""
        channels = [group for group in find_channel_groups(mod) if group.kind != "heads"]
        groups, notes = removable(mod, channels, self.spec, "filters")
        scores = self._scores(mod, groups)
        layers = find_layers(mod)
        if groups and all(score is None for score in scores):
            raise UsageError(
                f"{source_of(mod)}: {self.spec} cannot rank anything, as no batch norm was folded into a layer here; "
                "export the model without folding batch norm, or rank by=l1, l2 or activation"
            )
        for group, score in zip(groups, scores, strict=True):
            if score is None:
                reason = f"filters not removed: {self.spec.by} knows nothing of these channels"
                notes |= {layer.name: reason for layer in writers(layers, group)}
        ranked = [(group, score) for group, score in zip(groups, scores, strict=True) if score is not None]
        removals = choose(ranked, self.spec)
        return recorded(mod, remove(mod, removals, self.samples, self.update_weights), self.spec, notes)

    def _scores(self, mod: IRModule, groups: Sequence[ChannelGroup]) -> list[np.ndarray | None]:
        """What each channel of each group is worth; None for a group of which that is not known."""
        if self.spec.by == "activation":
            read = readers(mod, [Removal(group, np.arange(group.channels)) for group in groups])
            moments = input_moments(mod, self.samples or {}, read)
            score = partial(_size_as_read, {str(layer.weight.name): (layer, moments[layer.name]) for layer in read})
        elif self.spec.by == "norm-scale":
            score = partial(_norm_scale, norm_scales_of(mod))
        else:
            score = partial(_filter_norm, weights_of(mod), 1 if self.spec.by == "l1" else 2)
        return [score(group) for group in groups]


def choose(ranked: Sequence[tuple[ChannelGroup, np.ndarray]], spec: Filters) -> list[Removal]:
    """The channels that go: the least of each group, or of all together. Of equals the first goes."""
    wanted = [group.channels * (1 - spec.amount) for group, _ in ranked]
    if spec.everywhere and ranked:
        relative = [score / max(float(score.mean()), 1e-30) for _, score in ranked]
        count = round(spec.amount * sum(group.channels for group, _ in ranked))
        order = np.argsort(np.concatenate(relative), kind="stable")
        owner = np.repeat(np.arange(len(ranked)), [group.channels for group, _ in ranked])
        wanted = np.bincount(owner[order[count:]], minlength=len(ranked)).tolist()
    removals = []
    for (group, score), stay in zip(ranked, wanted, strict=True):
        gone = group.channels - kept_count(group, stay, spec.multiple)
        if gone:
            removals.append(Removal(group, np.sort(np.argsort(score, kind="stable")[:gone])))
    return removals


def kept_count(group: ChannelGroup, wanted: float, multiple: int) -> int:
    """The count nearest to ``wanted`` that leaves each writer a multiple of ``multiple`` outputs, or all of them."""
    width = gcd(*(slot.positions.shape[1] for slot in group.slots_of("producer")))  # 0 without any
    step = multiple // gcd(multiple, max(1, width))
    fewer = min(group.channels, max(step, step * round(wanted / step)))
    return fewer if abs(fewer - wanted) < group.channels - wanted else group.channels


def _filter_norm(weights: Mapping[str, np.ndarray], power: int, group: ChannelGroup) -> np.ndarray | None:
    """The sum over the group's writers of the norm of what computes each channel, ``[channels]``."""
    norms = []
    for slot in group.slots_of("producer"):
        array = np.abs(weights[slot.weight].astype(np.float64)) ** power
        total = array.sum(tuple(axis for axis in range(array.ndim) if axis != slot.axis))
        norms.append(total[slot.positions].sum(1) ** (1 / power))
    return np.sum(norms, axis=0) if norms else None


def _norm_scale(scales: Mapping[str, np.ndarray], group: ChannelGroup) -> np.ndarray | None:
    """The sum of ``|gamma|`` over the layers that write the channels and have one."""
    found = [scales[slot.weight][slot.positions].sum(1) for slot in group.slots if _is_scaled(slot, scales)]
    return np.sum(found, axis=0) if found else None


def _is_scaled(slot: Slot, scales: Mapping[str, np.ndarray]) -> bool:
    """Whether the slot is the output axis of a layer with a batch norm; a depthwise layer's is ``along``."""
    return slot.role != "consumer" and slot.axis == 0 and slot.weight in scales


def _size_as_read(inputs: Mapping[str, tuple[Layer, Moments]], group: ChannelGroup) -> np.ndarray | None:
    """The root mean square of each channel, over positions and the layers that read it."""
    squares = []
    for slot in group.slots_of("consumer"):
        if slot.weight in inputs:
            layer, moments = inputs[slot.weight]
            taps = int(np.prod(shape_of(layer.weight)[2:])) if layer.operator == "conv2d" else 1
            per_input = moments.mean_square.reshape(len(moments.gram), taps, -1).mean((0, 1))
            squares.append(per_input[slot.positions].mean(1))
    return np.sqrt(np.mean(squares, axis=0)) if squares else None
