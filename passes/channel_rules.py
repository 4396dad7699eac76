"""Which elements of which tensors belong to the same channel, found by one walk over the graph.

Every index along the axis of a weight gets a label, and operators carry labels from their operands to their results:
``conv2d`` gives its result the labels of its weight's output axis, ``reshape`` and ``concat`` move them as they move
values. Where two labels meet, because values are added or because a layer's input axis meets the channels that it
reads, they are the same channel. So nothing has to be known of residual adds, concats or depthwise layers as such, and
what a channel is after a flatten or a shuffle follows from where its elements went.

An operator without a rule fixes every channel that it touches, with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from tvm import relax
from tvm.ir import IRModule

from pumice.passes.channel_labels import OUTPUT, ChannelLabels, HeadLabels, LabelBook, labelled_axes, single_axis
from pumice.passes.dataflow import operands, operator_name
from pumice.passes.numpy_operators import plain
from pumice.passes.rewriting import is_tensor, shape_of


def label_channels(mod: IRModule) -> ChannelLabels:
    """Label ``mod``, which ``SimplifyModel`` has brought to the canonical form."""
    return _Walk(mod).run()


# One value in, one out, at the same place. Operands broadcast.
_ELEMENTWISE = {
    "abs", "acos", "acosh", "add", "asin", "asinh", "astype", "atan", "atanh", "broadcast_to", "ceil", "clip", "cos",
    "cosh", "divide", "equal", "erf", "exp", "floor", "floor_divide", "greater", "greater_equal", "isfinite", "isinf",
    "isnan", "less", "less_equal", "log", "logical_and", "logical_not", "logical_or", "maximum", "minimum", "multiply",
    "negative", "nn.gelu", "nn.gelu_tanh", "nn.leakyrelu", "nn.relu", "nn.selu", "nn.silu", "nn.softplus", "not_equal",
    "power", "round", "rsqrt", "sigmoid", "sign", "sin", "sinh", "sqrt", "square", "subtract", "tan", "tanh", "trunc",
    "where",
}  # fmt: skip
_PLANES = {"nn.max_pool2d", "nn.avg_pool2d", "nn.adaptive_avg_pool2d", "image.resize2d"}
_RESHAPES = {"reshape", "flatten", "squeeze", "expand_dims", "nn.batch_flatten"}
_REDUCTIONS = {"mean", "sum", "max", "min", "prod", "variance", "std"}
_Rule = Callable[[relax.Var, relax.Call], np.ndarray | None]


class _Walk(LabelBook):
    """The walk: a rule for each operator gives the labels of its result."""

    def run(self) -> ChannelLabels:
        """Walk, then give every label the smallest one that it met."""
        for var, value in self.graph.bindings:
            self.reader = var
            labels = self._labels_of(var, value)
            if labels is not None:
                self.found.tensors[var] = labels
        for var in self.graph.order:
            if var in self.graph.outputs and var in self.found.tensors:
                self._output(var, self.found.tensors[var])
        self._fix_weights()
        return self._resolved()

    def _labels_of(self, var: relax.Var, value: relax.Expr) -> np.ndarray | None:
        if isinstance(value, relax.Var):
            self.origin[var] = self.origin.get(value, "")
            return self.found.tensors.get(value)
        if isinstance(value, relax.TupleGetItem):
            parts = self.parts.get(value.tuple_value)
            self.origin[var] = self.origin.get(value.tuple_value, "")
            return parts[value.index] if parts is not None else None
        if not isinstance(value, relax.Call):
            return None  # a tuple of outputs
        rule = self._rule(operator_name(value))
        self.origin[var] = self._origin(var, value)
        if rule is None or not all(_is_static(each) for each in [var, *operands(value)]):
            return self._unknown(var, value)
        return rule(var, value)

    def _rule(self, operator: str) -> _Rule | None:
        for operators, rule in (
            (_ELEMENTWISE, self._elementwise),
            (_PLANES, self._planes),
            (_RESHAPES, self._reshape),
            (_REDUCTIONS, self._reduce),
        ):
            if operator in operators:
                return rule
        named: dict[str, _Rule] = {
            "nn.conv2d": self._conv2d,
            "matmul": self._matmul,
            "nn.layer_norm": self._norm,
            "nn.rms_norm": self._norm,
            "nn.group_norm": self._group_norm,
            "nn.softmax": self._softmax,
            "nn.log_softmax": self._softmax,
            "nn.prelu": self._prelu,
            "nn.attention": self._attention,
            "nn.attention_bias": self._attention,
            "nn.pad": self._pad,
            "permute_dims": self._permute_dims,
            "concat": self._concat,
            "split": self._split,
            "strided_slice": self._strided_slice,
            "take": self._take,
        }
        return named.get(operator)

    def _output(self, var: relax.Var, labels: np.ndarray) -> None:
        """An output can be put back into its order behind everything else, if nothing else reads it."""
        if isinstance(self.graph.value.get(var), relax.Var):
            return  # another name of what is an output itself
        self._mix(labels, OUTPUT)
        readers = [user for user in self.graph.users[var] if isinstance(self.graph.value[user], relax.Call)]
        if readers or single_axis(labels) is None:
            self._fix(labels, OUTPUT)
        else:
            self.found.outputs.append(var)

    # Rules

    def _unknown(
        self, var: relax.Var, call: relax.Call, why: str = "which orders or mixes its channels"
    ) -> np.ndarray | None:
        """No labels for the result, and a reason for those of the operands."""
        for operand in operands(call):
            self._fix(self.found.tensors.get(operand), f"{_call(var, call)} reads it, {why}")
        return None

    def _elementwise(self, var: relax.Var, call: relax.Call) -> np.ndarray | None:
        tensors = [argument for argument in call.args if is_tensor(argument)]
        rank, shape = len(shape_of(var)), shape_of(var)
        known = [_aligned(self.found.tensors[each], rank) for each in tensors if each in self.found.tensors]
        axes = sorted({axis for labels in known for axis in labelled_axes(labels)})
        if not axes:
            return None
        result = np.broadcast_to(known[0], [shape[axis] if axis in axes else 1 for axis in range(rank)])
        for each in map(self._narrow, tensors):
            full = (1,) * (rank - len(shape_of(each))) + shape_of(each)
            if each in self.found.tensors:
                self._meet(result, _aligned(self.found.tensors[each], rank))
            elif any(full[axis] > 1 for axis in axes):
                self._meet_unlabelled(var, call, result, each, axes)
        return result

    def _narrow(self, expr: relax.Expr) -> relax.Expr:
        """What was broadcast, in its own shape: it has one value for all channels."""
        while self.graph.op(expr) == "broadcast_to":
            expr = self.graph.value[expr].args[0]
        return expr

    def _meet_unlabelled(
        self, var: relax.Var, call: relax.Call, result: np.ndarray, other: relax.Expr, axes: Sequence[int]
    ) -> None:
        """An operand along the channels that is a weight, and so is ordered with them, or anything else."""
        rank = len(shape_of(var))
        missing = rank - len(shape_of(other))
        along = [axis for axis in axes if axis >= missing and shape_of(other)[axis - missing] > 1]
        if other in self.graph.weights and len(along) == 1:
            labels = self._weight(other, along[0] - missing, "along")
            self._meet(result, labels.reshape([-1 if axis == along[0] else 1 for axis in range(rank)]))
        else:
            self._fix(result, f"{_call(var, call)} combines it with {self._describe(other)}")

    def _conv2d(self, var: relax.Var, call: relax.Call) -> np.ndarray | None:
        data, weight = call.args
        attrs = call.attrs
        if (str(attrs.data_layout), str(attrs.kernel_layout)) != ("NCHW", "OIHW"):
            return self._unknown(var, call, f"in the layout {attrs.data_layout}")
        if not self._is_plain(weight):
            return self._unknown(var, call, "and its weight is quantized already or not a parameter")
        outputs, inputs = shape_of(weight)[:2]
        groups = int(attrs.groups)
        read = self._along(data, 1)
        if inputs == 1 and groups > 1:
            written = self._weight(weight, 0, "along")
            self._meet(np.repeat(read, outputs // groups), written)
        else:
            # All groups give and take the same number of channels, so the i-th of each go together.
            written = self._weight(weight, 0, "producer")
            self._meet(read.reshape(groups, inputs), self._weight(weight, 1, "consumer")[None])
            self._meet(written.reshape(groups, -1), written.reshape(groups, -1)[:1])
        return written.reshape(1, -1, 1, 1)

    def _matmul(self, var: relax.Var, call: relax.Call) -> np.ndarray | None:
        data, weight = call.args
        if not self._is_plain(weight) or len(shape_of(weight)) != 2:
            return self._unknown(var, call, "and its weight is quantized already or not a parameter")
        read = self.found.tensors.get(data)
        last = len(shape_of(data)) - 1
        if read is not None and last in labelled_axes(read):
            self._meet(read, self._weight(weight, 0, "consumer").reshape((1,) * last + (-1,)))
        else:
            self._meet(self._along(data, last), self._weight(weight, 0, "consumer"))
        return self._weight(weight, 1, "producer").reshape((1,) * (len(shape_of(var)) - 1) + (-1,))

    def _norm(self, var: relax.Var, call: relax.Call) -> np.ndarray | None:
        labels = self.found.tensors.get(call.args[0])
        if labels is None:
            return None
        rank = labels.ndim
        axes = [int(axis) % rank for axis in call.attrs.axes]
        normalized = [axis for axis in labelled_axes(labels) if axis in axes]
        if not normalized:
            return labels
        self._mix(labels, f"{_call(var, call)} takes statistics over it, which removing a channel changes")
        for parameter in call.args[1:]:
            self._parameter(var, call, labels, parameter, {axes.index(axis): axis for axis in normalized})
        return labels

    def _parameter(
        self, var: relax.Var, call: relax.Call, labels: np.ndarray, parameter: relax.Expr, axes: dict[int, int]
    ) -> None:
        """A scale or shift whose axes run along axes of the data: ``{its axis: the data's}``."""
        if parameter in self.graph.weights and len(axes) == 1:
            ((own, axis),) = axes.items()
            shape = [-1 if i == axis else 1 for i in range(labels.ndim)]
            self._meet(labels, self._weight(parameter, own, "along").reshape(shape))
        else:
            self._fix(labels, f"{_call(var, call)} combines it with {self._describe(parameter)}")

    def _group_norm(self, var: relax.Var, call: relax.Call) -> np.ndarray | None:
        labels = self.found.tensors.get(call.args[0])
        if labels is None:
            return None
        axis = int(call.attrs.channel_axis) % labels.ndim
        if labelled_axes(labels) != [axis]:
            return self._unknown(var, call)
        self._mix(labels, f"{_call(var, call)} takes statistics over it, which removing a channel changes")
        self.found.together += list(labels.reshape(int(call.attrs.num_groups), -1))
        for parameter in call.args[1:]:
            self._parameter(var, call, labels, parameter, {0: axis})
        return labels

    def _softmax(self, var: relax.Var, call: relax.Call) -> np.ndarray | None:
        labels = self.found.tensors.get(call.args[0])
        if labels is None or (axis := int(call.attrs.axis) % labels.ndim) not in labelled_axes(labels):
            return labels
        if labelled_axes(labels) != [axis]:
            return self._unknown(var, call, "which sums over some of its channels")
        self._mix(labels, f"{_call(var, call)} sums over it, so removing a channel changes the others")
        return labels

    def _prelu(self, var: relax.Var, call: relax.Call) -> np.ndarray | None:
        labels = self.found.tensors.get(call.args[0])
        if labels is not None and shape_of(call.args[1]) != (1,):
            axis = int(call.attrs.axis) % labels.ndim
            if labelled_axes(labels) != [axis]:
                return self._unknown(var, call)
            self._parameter(var, call, labels, call.args[1], {0: axis})
        return labels

    def _attention(self, var: relax.Var, call: relax.Call) -> np.ndarray | None:
        """Heads stay apart: a channel of the values goes to its own head's result, by its own head's weights."""
        grids = [self._heads(argument) for argument in call.args[:3]]
        if any(grid is None for grid in grids):
            return self._unknown(var, call, "along more than heads")
        query, key, value = (grid for grid in grids if grid is not None)
        self._meet(query, key)
        self.found.together += [*query, *value]
        fixed = None
        if len(call.args) > 3:
            bias = call.args[3]
            self._fix(self.found.tensors.get(bias), f"{_call(var, call)} has it for a bias")
            if len(shape_of(bias)) == 4 and shape_of(bias)[1] > 1:
                fixed = f"the bias of {_call(var, call)} has a part for each head"
        self.found.heads.append(HeadLabels(var, query, key, value, fixed))
        return value.reshape(1, 1, *value.shape)

    def _heads(self, data: relax.Expr) -> np.ndarray | None:
        """The labels ``[H, D]`` of ``[B, T, H, D]``."""
        shape = shape_of(data)
        labels = self.found.tensors.get(data)
        if labels is None:
            return self._new_fixed(shape[2] * shape[3], data).reshape(shape[2:])
        if set(labelled_axes(labels)) - {2, 3}:
            return None
        return np.broadcast_to(labels, (1, 1, *shape[2:])).reshape(shape[2:])

    def _planes(self, var: relax.Var, call: relax.Call) -> np.ndarray | None:
        labels = self.found.tensors.get(call.args[0])
        if labels is None or (str(call.attrs.layout) == "NCHW" and labelled_axes(labels) == [1]):
            return labels
        return self._unknown(var, call)

    def _pad(self, var: relax.Var, call: relax.Call) -> np.ndarray | None:
        labels = self.found.tensors.get(call.args[0])
        if labels is None:
            return None
        widths = np.array([int(width) for width in call.attrs.pad_width]).reshape(-1, 2)
        return self._unknown(var, call) if widths[labelled_axes(labels)].any() else labels

    def _reshape(self, var: relax.Var, call: relax.Call) -> np.ndarray | None:
        labels = self.found.tensors.get(call.args[0])
        if labels is None:
            return None
        return _compact(np.broadcast_to(labels, shape_of(call.args[0])).reshape(shape_of(var)))

    def _permute_dims(self, var: relax.Var, call: relax.Call) -> np.ndarray | None:
        labels = self.found.tensors.get(call.args[0])
        axes = call.attrs.axes
        return None if labels is None else labels.transpose(None if axes is None else [int(axis) for axis in axes])

    def _reduce(self, var: relax.Var, call: relax.Call) -> np.ndarray | None:
        labels = self.found.tensors.get(call.args[0])
        if labels is None:
            return None
        every = range(labels.ndim)
        axes = tuple(every if call.attrs.axis is None else (int(axis) % labels.ndim for axis in call.attrs.axis))
        over = [axis for axis in labelled_axes(labels) if axis in axes]
        if over:
            self._mix(labels, f"{_call(var, call)} reduces over it, which removing a channel changes")
            if over == labelled_axes(labels):
                self.origin[var] = f"the result of {_call(var, call)}"
                return None
            for axis in over:
                self._meet(labels, labels.take([0], axis))
                labels = labels.take([0], axis)
        return labels.reshape([n for axis, n in enumerate(labels.shape) if call.attrs.keepdims or axis not in axes])

    def _concat(self, var: relax.Var, call: relax.Call) -> np.ndarray | None:
        pieces = list(call.args[0].fields)
        rank = len(shape_of(var))
        axis = 0 if call.attrs.axis is None else int(call.attrs.axis) % rank
        known = [self.found.tensors[piece] for piece in pieces if piece in self.found.tensors]
        axes = {each for labels in known for each in labelled_axes(labels)}
        if not axes:
            return None
        arrays = [self._spread(var, call, piece, sorted(axes)) for piece in pieces]
        if axis in axes:
            return np.concatenate(arrays, axis)
        for array in arrays[1:]:
            self._meet(arrays[0], array)
        return arrays[0]

    def _spread(self, var: relax.Var, call: relax.Call, piece: relax.Expr, axes: list[int]) -> np.ndarray:
        """The labels of one piece, in full along these axes."""
        rank = len(shape_of(var))
        shape = [n if axis in axes else 1 for axis, n in enumerate(shape_of(piece))]
        if piece in self.found.tensors:
            return np.broadcast_to(self.found.tensors[piece], shape)
        if piece in self.graph.weights and len(axes) == 1:
            return self._weight(piece, axes[0], "along").reshape([-1 if i == axes[0] else 1 for i in range(rank)])
        return self._new_fixed(int(np.prod(shape)), piece).reshape(shape)

    def _split(self, var: relax.Var, call: relax.Call) -> np.ndarray | None:
        labels = self.found.tensors.get(call.args[0])
        count = len(var.ty.fields)
        if labels is None:
            return None
        axis = int(call.attrs.axis) % labels.ndim
        if axis not in labelled_axes(labels):
            self.parts[var] = [labels] * count
        else:
            lengths = [_shape_of_field(var, index)[axis] for index in range(count)]
            self.parts[var] = list(np.split(labels, np.cumsum(lengths)[:-1], axis))
        return None

    def _strided_slice(self, var: relax.Var, call: relax.Call) -> np.ndarray | None:
        labels = self.found.tensors.get(call.args[0])
        if labels is None:
            return None
        axes, begins, ends = ([plain(each) for each in argument.fields] for argument in call.args[1:4])
        steps = [plain(each) for each in call.args[4].fields] if len(call.args) > 4 else [1] * len(axes)
        if None in [*axes, *begins, *ends, *steps]:
            return self._unknown(var, call)
        for axis, begin, end, step in zip(axes, begins, ends, steps, strict=True):
            if axis % labels.ndim in labelled_axes(labels):
                if step != 1:
                    return self._unknown(var, call, "with steps")
                labels = labels[(slice(None),) * (axis % labels.ndim) + (slice(begin, end),)]
        return labels

    def _take(self, var: relax.Var, call: relax.Call) -> np.ndarray | None:
        data, index = call.args
        rank = len(shape_of(index))
        axis = None if call.attrs.axis is None else int(call.attrs.axis) % len(shape_of(data))
        if data in self.graph.weights and len(shape_of(data)) == 2 and axis == 0 and self._is_plain(data):
            return self._weight(data, 1, "producer").reshape((1,) * rank + (-1,))
        labels = self.found.tensors.get(data)
        if labels is None:
            return None
        if axis is None or axis in labelled_axes(labels):
            return self._unknown(var, call)
        return labels.reshape(*labels.shape[:axis], *(1,) * rank, *labels.shape[axis + 1 :])

    def _origin(self, var: relax.Var, call: relax.Call) -> str:
        """What made a tensor that has no labels: the first of its operands that has a history."""
        known = (self.origin[each] for each in operands(call) if each in self.origin)
        if operator_name(call) in _ELEMENTWISE | _RESHAPES | _PLANES:
            return next(known, f"the result of {_call(var, call)}")
        return f"the result of {_call(var, call)}"


def _shape_of_field(var: relax.Var, index: int) -> tuple[int, ...]:
    """The shape of one tensor of a tuple."""
    return tuple(int(size) for size in var.ty.fields[index].shape)


def _aligned(labels: np.ndarray, rank: int) -> np.ndarray:
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)


def _compact(labels: np.ndarray) -> np.ndarray:
    """``labels`` with length 1 along the axes along which they do not change."""
    for axis in range(labels.ndim):
        first = labels.take([0], axis)
        if (labels == first).all():
            labels = first
    return labels


def _is_static(var: relax.Var) -> bool:
    ty = var.ty
    return not isinstance(ty, relax.TensorType) or is_tensor(var)


def _call(var: relax.Var, call: relax.Call) -> str:
    return f"{operator_name(call)} {var.name!r}"
