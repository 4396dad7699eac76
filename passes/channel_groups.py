"""Groups of coupled channels: what must be moved, or removed, together, and where it lies in the weights.

The output channels of a layer are the input channels of its readers, the entries of its bias and of the norms behind
it, the channels of whatever is added to it, and so on (see ``channel_labels`` for how they are found). All of that is
one ``ChannelGroup``, and any order of its channels gives the same model, as long as every slot has that order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from tvm import relax
from tvm.ir import IRModule

from pumice.module import weights_of, with_weights
from pumice.passes.channel_labels import ChannelLabels, HeadLabels, single_axis
from pumice.passes.channel_rules import label_channels
from pumice.passes.fold_batch_norm import norm_scales_of, with_norm_scales
from pumice.passes.rewriting import Rewriter, rewrite


@dataclass(frozen=True, eq=False)
class Slot:
    """Where the channels of a group lie in one weight.

    ``positions[i]`` are the indices along ``axis`` that belong to channel ``i``, ascending: int64 ``[channels, k]``.
    ``k`` is more than 1 behind a flatten (a channel is as many features as it had pixels), in a convolution in groups
    (one for each group), and where a channel is a whole attention head. Two groups can share an axis, as behind a
    concat. ``role``: ``producer``, the axis runs over a layer's outputs (or an embedding's); ``consumer``, over its
    inputs; ``along``, anything with a value for each channel: biases, norms, depthwise weights, added constants.
    """

    weight: str
    axis: int
    role: str
    positions: np.ndarray


@dataclass(frozen=True, eq=False)
class TensorSlot:
    """Where the channels of a group lie in an activation; ``positions`` as in ``Slot``."""

    var: relax.Var
    axis: int
    positions: np.ndarray


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that can change places with each other, and all the places that then change.

    ``kind`` is ``channels``; ``heads``, each channel being a whole head of an ``nn.attention``; or ``head``, the
    channels inside one head: those of its queries and keys, or those of its values. What a ``heads`` group holds the
    ``head`` groups hold too, in smaller pieces.

    ``fixed`` says why the channels cannot even change places: an input of the model, an operator that orders or mixes
    them in a way that is not understood, a weight that is int8 already, or one that is also read elsewhere.
    ``not_removable`` says why one of them cannot be removed: an output of the model, or a layer norm, whose
    statistics would change; it is set wherever ``fixed`` is.

    ``outputs`` are those of the model that have these channels, such as the embedding that a residual stream ends in;
    whoever permutes the group has to put them in order again at run time, which ``permuted`` does.
    """

    kind: str
    channels: int
    slots: tuple[Slot, ...]
    tensors: tuple[TensorSlot, ...]  # the activations in between that have channels along one axis
    outputs: tuple[TensorSlot, ...]
    fixed: str | None
    not_removable: str | None

    def slots_of(self, role: str) -> list[Slot]:
        """The slots with this role."""
        return [slot for slot in self.slots if slot.role == role]


def find_channel_groups(mod: IRModule, labels: ChannelLabels | None = None) -> list[ChannelGroup]:
    """The groups of ``mod`` in the order of its weights, fixed ones too; heads behind the rest.

    ``mod`` is in the canonical form of ``SimplifyModel``; ``labels`` are those of ``mod``, where they are known.
    """
    labels = label_channels(mod) if labels is None else labels
    inside = {label for head in labels.heads for channel in _heads_of(head) for label in channel}
    groups = []
    for members in _interchangeable(labels):
        kind = "head" if inside.intersection(members) else "channels"
        reason = "it is a part of an attention head, and all heads have the same size" if kind == "head" else None
        groups.append(_Group(kind, [{label} for label in members], None, reason))
    return [*_located(labels, groups), *_located(labels, [_whole_heads(head) for head in labels.heads])]


def permuted_weights(
    weights: Mapping[str, np.ndarray], group: ChannelGroup, order: np.ndarray
) -> dict[str, np.ndarray]:
    """The weights that change, by name, when channel ``order[i]`` of the group becomes its channel ``i``.

    ``order`` is a permutation, int ``[channels]``; ``weights`` has the group's weights by name.
    """
    if group.fixed is not None or not np.array_equal(np.sort(order), np.arange(group.channels)):
        raise ValueError(f"no such order of these channels: {group.fixed or order}")
    changed: dict[str, np.ndarray] = {}
    for slot in group.slots:
        array = changed.get(slot.weight, weights[slot.weight])
        changed[slot.weight] = array.take(source_indices(slot, order, array.shape[slot.axis]), slot.axis)
    return changed


def source_indices(slot: Slot | TensorSlot, order: np.ndarray, length: int) -> np.ndarray:
    """``[length]``: which index along the slot's axis each index takes its values from under ``order``."""
    indices = np.arange(length)
    indices[slot.positions.ravel()] = slot.positions[order].ravel()
    return indices


def permuted(mod: IRModule, group: ChannelGroup, order: np.ndarray) -> IRModule:
    """``mod`` with the channels of the group in another order, and what it computes as before.

    The graph stays the same, but for a ``take`` in front of each output that has channels of the group.
    """
    weights, scales = weights_of(mod), norm_scales_of(mod)
    for slot in group.slots_of("producer"):
        if slot.weight in scales:
            scale = scales[slot.weight]
            scales[slot.weight] = scale[source_indices(slot, order, len(scale))]
    mod = with_weights(mod, {**weights, **permuted_weights(weights, group, order)})
    mod = with_norm_scales(mod, scales)
    restored = {slot.var: slot for slot in group.outputs}

    def visit(rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        slot = restored.get(var)
        if slot is None:
            return None
        back = np.argsort(source_indices(slot, order, int(var.ty.shape[slot.axis])))
        return relax.op.take(rewriter.emit(value, "permuted"), relax.const(back, "int64"), slot.axis, mode="clip")

    return rewrite(mod, visit) if restored else mod


@dataclass(frozen=True)
class _Group:
    """A group before its places are known: the labels of each channel."""

    kind: str
    channels: list[set[int]]
    fixed: str | None = None
    not_removable: str | None = None


def _interchangeable(labels: ChannelLabels) -> list[list[int]]:
    """Labels that occur equally often in all the same places and are fixed by the same, ascending."""
    places = [*labels.weights.values(), *labels.tensors.values(), *labels.together]
    occurrences: dict[int, list[tuple[int, int]]] = {}
    for number, place in enumerate(places):
        for label, count in zip(*(each.tolist() for each in np.unique(place, return_counts=True)), strict=True):
            occurrences.setdefault(label, []).append((number, count))
    alike: dict[tuple[object, ...], list[int]] = {}
    for label in sorted(occurrences):
        alike.setdefault((*occurrences[label], labels.fixed.get(label)), []).append(label)
    return list(alike.values())


def _heads_of(head: HeadLabels) -> list[set[int]]:
    """The labels of each head."""
    grids = (head.query, head.key, head.value)
    return [set(np.concatenate([grid[index] for grid in grids]).tolist()) for index in range(len(head.query))]


def _whole_heads(head: HeadLabels) -> _Group:
    """The heads of an attention; those that share a channel of anything cannot be told apart."""
    channels = _heads_of(head)
    everything = set().union(*channels)
    if sum(map(len, channels)) == len(everything):
        return _Group("heads", channels, head.fixed)
    return _Group("heads", [everything], "its heads share keys, values or weights")


def _located(labels: ChannelLabels, groups: list[_Group]) -> list[ChannelGroup]:
    """The groups with their places, but for those that no weight has channels of."""
    owner = np.full((1 + max((max(channel) for group in groups for channel in group.channels), default=0), 2), -1)
    for number, group in enumerate(groups):
        for index, channel in enumerate(group.channels):
            owner[list(channel)] = number, index
    in_grids = {label for place in labels.tensors.values() if _is_grid(place) for label in place.ravel().tolist()}
    slots: list[list[Slot]] = [[] for _ in groups]
    tensors: list[list[TensorSlot]] = [[] for _ in groups]
    for (weight, axis), place in labels.weights.items():
        for number, positions in _positions(place, owner, groups):
            slots[number].append(Slot(weight, axis, labels.roles[weight, axis], positions))
    for var, place in labels.tensors.items():
        along = single_axis(place)
        if along is not None:
            for number, positions in _positions(place.ravel(), owner, groups):
                tensors[number].append(TensorSlot(var, along, positions))
    located = []
    for group, own_slots, own_tensors in zip(groups, slots, tensors, strict=True):
        members = sorted(label for channel in group.channels for label in channel)
        fixed = group.fixed or next((labels.fixed[label] for label in members if label in labels.fixed), None)
        mixed = group.not_removable or next((labels.mixed[label] for label in members if label in labels.mixed), None)
        if group.kind == "channels" and in_grids.intersection(members):
            mixed = mixed or "it lies in a tensor that has channels along several axes, which would have a gap"
        outputs = tuple(slot for slot in own_tensors if slot.var in labels.outputs)
        found = (tuple(own_slots), tuple(own_tensors), outputs)
        if own_slots:
            located.append(ChannelGroup(group.kind, len(group.channels), *found, fixed, fixed or mixed))
    return located


def _is_grid(place: np.ndarray) -> bool:
    """Whether a tensor has different channels along more than one axis."""
    return sum(bool((place != place.take([0], axis)).any()) for axis in range(place.ndim)) > 1


def _positions(place: np.ndarray, owner: np.ndarray, groups: list[_Group]) -> Iterator[tuple[int, np.ndarray]]:
    """Each group that has channels in a place, and where: ``[channels, k]``."""
    inside = np.flatnonzero(place < len(owner))
    numbers, channels = owner[place[inside]].T
    for number in np.unique(numbers[numbers >= 0]).tolist():
        own = np.flatnonzero(numbers == number)
        by_channel = own[np.argsort(channels[own], kind="stable")]
        yield number, inside[by_channel].reshape(len(groups[number].channels), -1)
