"""What removing filters and removing heads have in common: who is asked, what is made up for, what is written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from tvm.ir import IRModule

from pumice.module import source_of, with_layers
from pumice.passes.channel_groups import ChannelGroup
from pumice.passes.channel_rules import label_channels
from pumice.passes.layers import Layer, find_layers
from pumice.passes.prune_spec import PruneSpec, check_globs
from pumice.passes.refit_readers import readers, refit_readers
from pumice.passes.slice_channels import Removal, without_channels
from pumice.passes.sparsity import describe
from pumice.passes.statistics import input_moments
from pumice.record import LayerRecord

Notes = dict[str, str]  # by layer name


def removable(
    mod: IRModule, groups: Sequence[ChannelGroup], spec: PruneSpec, what: str
) -> tuple[list[ChannelGroup], Notes]:
    """The groups from which ``spec`` may remove channels, and for the layers that write the others, why not.

    ``what`` is removed from them, in words. Raises UsageError where ``keep`` or ``only`` name no layer.
    """
    layers = find_layers(mod)
    check_globs(spec, [(layer.name, str(layer.weight.name)) for layer in layers], source_of(mod))
    found: list[ChannelGroup] = []
    notes: dict[str, str] = {}
    for group in groups:
        written = writers(layers, group)
        reason = group.not_removable or _kept(written, group, spec)
        if reason is None:
            found.append(group)
        else:
            notes |= {layer.name: f"{what} not removed: {reason}" for layer in written}
    return found, notes


def writers(layers: Sequence[Layer], group: ChannelGroup) -> list[Layer]:
    """The layers whose output channels are in the group, depthwise ones included."""
    axes = {(slot.weight, slot.axis) for slot in group.slots}
    return [layer for layer in layers if (layer.weight.name, layer.channel_axis) in axes]


def remove(
    mod: IRModule,
    removals: Sequence[Removal],
    samples: Mapping[str, np.ndarray] | None,
    update_weights: bool = True,
) -> IRModule:
    """``mod`` without these channels, made up for by their readers if there are samples (``refit_readers``)."""
    if samples is not None and (layers := readers(mod, removals)):
        mod = refit_readers(mod, removals, input_moments(mod, samples, layers), update_weights)
    return without_channels(mod, label_channels(mod), removals)


def recorded(before: IRModule, after: IRModule, spec: PruneSpec, notes: Mapping[str, str]) -> IRModule:
    """``after`` with records that say how much of each layer is left, and with the notes on those left alone."""
    old = describe(before)
    records = describe(with_layers(after, old))
    axes = {layer.name: layer.channel_axis for layer in find_layers(before)}
    for name, record in records.items():
        outputs, inputs = ((old[name].shape[axis], record.shape[axis]) for axis in (axes[name], 1 - axes[name]))
        if outputs[0] != outputs[1]:
            record.pruned_by = f"{old[name].pruned_by}, then {spec}" if old[name].pruned_by else str(spec)
            _note(record, f"{outputs[1]} of {outputs[0]} output channels left")
        if inputs[0] != inputs[1]:
            _note(record, f"{inputs[1]} of {inputs[0]} input channels left")
        if name in notes:
            _note(record, notes[name])
    return with_layers(after, records)


def _note(record: LayerRecord, note: str) -> None:
    if note not in record.notes:
        record.notes.append(note)


def _kept(written: Sequence[Layer], group: ChannelGroup, spec: PruneSpec) -> str | None:
    """Why the user wants the group left alone. A depthwise layer only follows, so ``only`` need not name it."""
    producers = {slot.weight for slot in group.slots_of("producer")}
    for layer in written:
        asked = spec if layer.weight.name in producers else replace(spec, only=())
        reason = asked.keeps(layer.name, layer.weight.name)
        if reason is not None:
            return reason if len(written) == 1 else f"{reason}, for {layer.name}"
    return None
