"""Labels of channels: what a walk over the graph notes down, and what follows from where labels met.

Every index along the axis of a weight gets a label. Where two labels meet they are the same channel; some are fixed to
their place, and some cannot be removed. ``channel_rules.py`` is the walk.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from tvm import relax
from tvm.ir import GenericConst, IRModule

from pumice.passes.dataflow import Dataflow
from pumice.passes.rewriting import dtype_of, shape_of

Axis = tuple[str, int]  # a weight's name and one of its axes
OUTPUT = "it is an output of the model"


@dataclass(frozen=True)
class HeadLabels:
    """The channels of an ``nn.attention``, each ``[heads, size of a head]``."""

    attention: relax.Var
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    fixed: str | None  # why no whole head can be moved or removed


@dataclass
class ChannelLabels:
    """What the walk found. A label is an int; two places with the same label are the same channel.

    weights: the labels along an axis of a weight, ``[length]``; roles: what that axis is to its layer.
    tensors: the labels of an activation, an array of its rank that broadcasts to its shape.
    outputs: the outputs of the model that have channels, whose order is the user's.
    together: sets of labels that may change places among themselves only (the channels of one attention head).
    fixed, mixed: why a label's channel cannot change places, and why it cannot be removed.
    """

    weights: dict[Axis, np.ndarray] = field(default_factory=dict)
    roles: dict[Axis, str] = field(default_factory=dict)
    tensors: dict[relax.Var, np.ndarray] = field(default_factory=dict)
    outputs: list[relax.Var] = field(default_factory=list)
    together: list[np.ndarray] = field(default_factory=list)
    heads: list[HeadLabels] = field(default_factory=list)
    fixed: dict[int, str] = field(default_factory=dict)
    mixed: dict[int, str] = field(default_factory=dict)


def single_axis(labels: np.ndarray) -> int | None:
    """The one axis along which a tensor has channels; None if there are several or none."""
    axes = labelled_axes(labels)
    return axes[0] if len(axes) == 1 else None


def labelled_axes(labels: np.ndarray) -> list[int]:
    """The axes along which a tensor has channels."""
    return [axis for axis, size in enumerate(labels.shape) if size > 1]


class LabelBook:
    """What is noted on the way. A tensor without labels has no entry in ``tensors``, and in ``origin`` what made it."""

    def __init__(self, mod: IRModule) -> None:
        self.graph = Dataflow(mod)
        self.found = ChannelLabels()
        self.parts: dict[relax.Var, list[np.ndarray | None]] = {}  # of tuples
        self.origin: dict[relax.Expr, str] = {var: f"the model's input {var.name!r}" for var in self.graph.inputs}
        self.count = 0
        self.meetings: list[tuple[np.ndarray, np.ndarray]] = []
        self.fixed: list[tuple[np.ndarray, str]] = []
        self.mixed: list[tuple[np.ndarray, str]] = []
        self.axes: dict[
            relax.Var, dict[relax.Var, set[int]]
        ] = {}  # of a weight, by who reads it: what is accounted for
        self.reader: relax.Var | None = None

    def _along(self, data: relax.Expr, axis: int) -> np.ndarray:
        """The labels of a layer's input along its channels; new ones, fixed, where it has none."""
        labels = self.found.tensors.get(data)
        if labels is not None and labelled_axes(labels) == [axis]:
            return labels.ravel()
        self._fix(labels, "a layer reads it along another axis")
        return self._new_fixed(shape_of(data)[axis], data)

    def _new(self, count: int) -> np.ndarray:
        self.count += count
        return np.arange(self.count - count, self.count)

    def _new_fixed(self, count: int, source: relax.Expr) -> np.ndarray:
        labels = self._new(count)
        self._fix(labels, f"it comes from {self._describe(source)}")
        return labels

    def _weight(self, weight: relax.Var, axis: int, role: str) -> np.ndarray:
        """The labels along an axis of a weight; the same ones for everybody who reads it."""
        key = (str(weight.name), axis)
        if key not in self.found.weights:
            self.found.weights[key] = self._new(shape_of(weight)[axis])
            if dtype_of(weight) != "float32":
                self._fix(self.found.weights[key], f"{weight.name} is {dtype_of(weight)} already")
        if self.found.roles.get(key, "along") == "along":
            self.found.roles[key] = role
        if self.reader is not None:
            self.axes.setdefault(weight, {}).setdefault(self.reader, set()).add(axis)
        return self.found.weights[key]

    def _meet(self, a: np.ndarray, b: np.ndarray) -> None:
        both = np.broadcast_arrays(a, b)
        self.meetings.append((both[0].ravel(), both[1].ravel()))

    def _fix(self, labels: np.ndarray | None, reason: str) -> None:
        if labels is not None:
            self.fixed.append((labels.ravel(), reason))

    def _mix(self, labels: np.ndarray, reason: str) -> None:
        self.mixed.append((labels.ravel(), reason))

    def _fix_weights(self) -> None:
        """An axis of a weight is free only if everybody who reads the weight follows its order."""
        for weight, readers in self.axes.items():
            for axis in range(len(shape_of(weight))):
                others = [var for var in self.graph.users[weight] if axis not in readers.get(var, ())]
                if others:
                    reason = f"{weight.name} is shared with {others[0].name}, which needs its order"
                    self._fix(self.found.weights.get((str(weight.name), axis)), reason)
            if weight in self.graph.outputs:
                for axis in range(len(shape_of(weight))):
                    self._fix(self.found.weights.get((str(weight.name), axis)), OUTPUT)

    def _is_plain(self, weight: relax.Expr) -> bool:
        return weight in self.graph.weights and dtype_of(weight) == "float32"

    def _describe(self, expr: relax.Expr) -> str:
        if isinstance(expr, GenericConst):
            return "a constant"
        if expr in self.graph.weights:
            return f"the weight {expr.name}"
        return self.origin.get(expr) or f"{expr.name}, which has no channels of its own"

    def _resolved(self) -> ChannelLabels:
        """Every label as the smallest one that it met."""
        root = _smallest_met(self.count, self.meetings)
        found = self.found
        for name, arrays in (("fixed", self.fixed), ("mixed", self.mixed)):
            reasons = getattr(found, name)
            for labels, reason in arrays:
                for label in np.unique(root[labels]).tolist():
                    reasons.setdefault(label, reason)
        return ChannelLabels(
            {key: root[labels] for key, labels in found.weights.items()},
            found.roles,
            {var: root[labels] for var, labels in found.tensors.items()},
            found.outputs,
            [root[labels] for labels in found.together],
            [HeadLabels(h.attention, root[h.query], root[h.key], root[h.value], h.fixed) for h in found.heads],
            found.fixed,
            found.mixed,
        )


def _smallest_met(count: int, meetings: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """For each label the smallest that it met, directly or by way of others."""
    root = np.arange(count)
    if not meetings:
        return root
    a, b = (np.concatenate(side) for side in zip(*meetings, strict=True))
    while True:
        smaller = np.minimum(root[a], root[b])
        after = root.copy()
        for side in (root[a], root[b]):
            np.minimum.at(after, side, smaller)
        after = after[after]
        if np.array_equal(after, root):
            return root
        root = after
