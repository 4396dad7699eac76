"""Taking channels out of a module: the weights sliced, and the graph built again with what is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import relax
from tvm.ir import IRModule
from tvm.relax import op
from tvm_ffi import structural_equal

from pumice.errors import PumiceError
from pumice.module import inputs_of, source_of, weight_vars_of, weights_of, with_weights
from pumice.passes.channel_groups import ChannelGroup
from pumice.passes.channel_labels import ChannelLabels
from pumice.passes.dataflow import Dataflow, operator_name, substitute
from pumice.passes.fold_batch_norm import norm_scales_of, with_norm_scales
from pumice.passes.numpy_operators import plain
from pumice.passes.rewriting import is_tensor, shape_of


@dataclass(frozen=True, eq=False)
class Removal:
    """Channels of a group that go: their indices in the group, ascending."""

    group: ChannelGroup
    channels: np.ndarray

    @property
    def kept(self) -> int:
        """How many channels stay."""
        return self.group.channels - len(self.channels)


def without_channels(mod: IRModule, labels: ChannelLabels, removals: Sequence[Removal]) -> IRModule:
    """``mod`` as the smaller network without these channels; ``labels`` are those of ``mod``.

    Before, where channel 1 of 3 goes::

        y = relu(conv2d(x, w [3, C, 3, 3]) + b [1, 3, 1, 1]);  z = conv2d(y, v [N, 3, 1, 1])

    After::

        y = relu(conv2d(x, w[[0, 2]]) + b[:, [0, 2]]);  z = conv2d(y, v[:, [0, 2]])

    What a removed channel contributed to its readers is gone; see ``refit_readers``. Names of variables and weights
    stay. Shapes and counts that the graph spells out (of a reshape, of the groups of a depthwise convolution) are
    adjusted. Raises ValueError for a channel that cannot be removed, or where none of a group would be left.
    """
    for removal in removals:
        if removal.group.not_removable is not None or (removal.kept < 1 and removal.group.channels):
            raise ValueError(f"these channels cannot be removed: {removal.group.not_removable or 'none would be left'}")
    gone = _gone(labels, removals)
    kept = {axis: np.flatnonzero(~gone[place]) for axis, place in labels.weights.items()}
    weights, scales = dict(weights_of(mod)), norm_scales_of(mod)
    for (name, axis), indices in kept.items():
        if len(indices) < weights[name].shape[axis]:
            weights[name] = weights[name].take(indices, axis)
            if name in scales and axis == 0:
                scales[name] = scales[name][indices]
    # The shapes fit the weights again only when both are in place.
    return with_norm_scales(with_weights(_Slicing(mod, labels, gone, weights).run(), weights), scales)


def _gone(labels: ChannelLabels, removals: Sequence[Removal]) -> np.ndarray:
    """Whether each label goes."""
    places = [*labels.weights.values(), *labels.tensors.values()]
    gone = np.zeros(1 + max((int(place.max()) for place in places), default=0), bool)
    for removal in removals:
        for slot in removal.group.slots:
            gone[labels.weights[slot.weight, slot.axis][slot.positions[removal.channels]]] = True
    return gone


class _Slicing:
    """One walk over ``main`` in which every shape may change."""

    def __init__(
        self, mod: IRModule, labels: ChannelLabels, gone: np.ndarray, weights: Mapping[str, np.ndarray]
    ) -> None:
        self.mod = mod
        self.labels = labels
        self.gone = gone
        self.weights = weights
        self.graph = Dataflow(mod)
        self.builder = relax.BlockBuilder()
        self.replaced: dict[relax.Var, relax.Expr] = {}

    def run(self) -> IRModule:
        main = self.mod["main"]
        params = [*inputs_of(self.mod), *(self._parameter(var) for var in weight_vars_of(self.mod))]
        bindings = []
        for var, value in self.graph.bindings:
            result = self.builder.normalize(self._adjusted(var, value))
            self._check(var, result)
            new = var if structural_equal(result.ty, var.ty) else type(var)(var.name, result.ty)
            self.replaced[var] = new
            bindings.append(relax.VarBinding(new, result))
        body = relax.SeqExpr([relax.DataflowBlock(bindings)], substitute(main.body.body, self.replaced))
        function = relax.Function(params, body, main.ret_ty, main.is_pure, main.attrs)
        mod = self.mod.clone()
        mod.update_func(mod.get_global_var("main"), self.builder.normalize(function))
        return mod

    def _parameter(self, var: relax.Var) -> relax.Var:
        array = self.weights.get(var.name)
        if array is None or array.shape == shape_of(var):
            return var
        self.replaced[var] = relax.Var(var.name, relax.TensorType(array.shape, str(array.dtype)))
        return self.replaced[var]

    def _adjusted(self, var: relax.Var, value: relax.Expr) -> relax.Expr:
        new = substitute(value, self.replaced)
        adjust = _ADJUSTED.get(operator_name(value))
        return new if adjust is None else adjust(self, var, value, new)

    def kept_shape(self, var: relax.Var) -> tuple[int, ...]:
        """The shape of an activation without the channels that go."""
        shape = list(shape_of(var))
        place = self.labels.tensors.get(var)
        if place is not None:
            keep = ~self.gone[place]
            for axis in range(keep.ndim):
                if keep.shape[axis] > 1:
                    shape[axis] = int(self.kept_along(var, axis).sum())
        return tuple(shape)

    def kept_along(self, var: relax.Var, axis: int) -> np.ndarray:
        """Which indices along an axis of an activation stay: those with any channel that does."""
        place = self.labels.tensors.get(var)
        if place is None or place.shape[axis] == 1:
            return np.ones(shape_of(var)[axis], bool)
        others = tuple(other for other in range(place.ndim) if other != axis)
        return np.asarray((~self.gone[place]).any(others))

    def _check(self, var: relax.Var, result: relax.Expr) -> None:
        place = self.labels.tensors.get(var)
        if not is_tensor(var) or (place is None and shape_of(result) == shape_of(var)):
            return
        whole = place is None or int((~self.gone[place]).sum()) == np.prod(
            [int(self.kept_along(var, axis).sum()) for axis in range(place.ndim) if place.shape[axis] > 1]
        )
        if not whole or shape_of(result) != self.kept_shape(var):
            raise PumiceError(
                f"{source_of(self.mod)}: without the removed channels {var.name} became {result.ty}, where "
                f"{self.kept_shape(var)} was to be left of {var.ty}; this is a defect in Pumice, please report it"
            )


def _reshape(slicing: _Slicing, var: relax.Var, old: relax.Call, new: relax.Call) -> relax.Expr:
    return op.reshape(new.args[0], slicing.kept_shape(var))


def _broadcast_to(slicing: _Slicing, var: relax.Var, old: relax.Call, new: relax.Call) -> relax.Expr:
    return op.broadcast_to(new.args[0], slicing.kept_shape(var))


def _conv2d(slicing: _Slicing, var: relax.Var, old: relax.Call, new: relax.Call) -> relax.Expr:
    attrs = old.attrs
    inputs = shape_of(old.args[0])[1]
    if int(attrs.groups) != inputs or shape_of(new.args[0])[1] == inputs:
        return new  # a convolution in groups keeps its groups, and loses the same number of channels in each
    return op.nn.conv2d(
        *new.args,
        strides=[int(step) for step in attrs.strides],
        padding=[int(size) for size in attrs.padding],
        dilation=[int(step) for step in attrs.dilation],
        groups=shape_of(new.args[0])[1],
        data_layout=str(attrs.data_layout),
        kernel_layout=str(attrs.kernel_layout),
        out_layout=str(attrs.out_layout),
        out_dtype=attrs.out_dtype,
    )


def _split(slicing: _Slicing, var: relax.Var, old: relax.Call, new: relax.Call) -> relax.Expr:
    axis = int(old.attrs.axis) % len(shape_of(old.args[0]))
    kept = slicing.kept_along(old.args[0], axis)
    if kept.all():
        return new
    ends = np.cumsum([int(part.shape[axis]) for part in var.ty.fields])[:-1]
    return op.split(new.args[0], [int(kept[:end].sum()) for end in ends], axis)


def _strided_slice(slicing: _Slicing, var: relax.Var, old: relax.Call, new: relax.Call) -> relax.Expr:
    data = old.args[0]
    axes, begins, ends = ([int(plain(each)) for each in argument.fields] for argument in old.args[1:4])
    steps = [int(plain(each)) for each in old.args[4].fields] if len(old.args) > 4 else [1] * len(axes)
    for index, axis in enumerate(axes):
        kept = slicing.kept_along(data, axis % len(shape_of(data)))
        if not kept.all():
            first, last, _ = slice(begins[index], ends[index]).indices(len(kept))
            begins[index], ends[index] = int(kept[:first].sum()), int(kept[:last].sum())
    return op.strided_slice(new.args[0], axes, begins, ends, steps)


_Adjust = Callable[[_Slicing, relax.Var, relax.Call, relax.Call], relax.Expr]
_ADJUSTED: dict[str, _Adjust] = {
    **dict.fromkeys(("reshape", "flatten", "squeeze", "expand_dims", "nn.batch_flatten"), _reshape),
    "broadcast_to": _broadcast_to,
    "nn.conv2d": _conv2d,
    "split": _split,
    "strided_slice": _strided_slice,
}
