"""What Relax operators mean, in PyTorch, with gradients: one table, operator -> function.

A rule is called as ``rule(call, ty, *operands)``: the call, for its attributes, the type of its result, and its
arguments as tensors, tuples of tensors, shapes and numbers. Every rule works under ``torch.func.vmap``. What a
``quantize`` gives stays a float tensor that holds integers, so that gradients pass it (straight-through).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import relax, tirx

from pumice.errors import MissingDependencyError, UnsupportedError

try:
    import torch
except ImportError as error:
    raise MissingDependencyError(
        "running a model with gradients needs the package torch: pip install 'pumice[torch]'"
    ) from error

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Tensor", "fake_quantized", "rounded", "rule_of", "torch", "torch_dtype"]

Rule = Callable[..., Any]


def rule_of(operator: str) -> Rule | None:
    """The function of an operator without its ``relax.``, such as ``nn.conv2d``; None where there is none."""
    return _TABLE.get(operator)


def rounded(x: Tensor) -> Tensor:
    """``x`` to the nearest integer, half to even; its gradient is that of ``x`` (straight-through)."""
    return x + (torch.round(x) - x).detach()


def fake_quantized(x: Tensor, scale: Tensor | float, zero_point: float, lowest: int, largest: int) -> Tensor:
    """``x`` as it comes back from integers ``lowest..largest``; beyond them the gradient is zero."""
    return (torch.clamp(rounded(x / scale) + zero_point, lowest, largest) - zero_point) * scale


def torch_dtype(name: str) -> torch.dtype:
    """numpy's name of a data type as PyTorch's."""
    return torch.bool if name == "bool" else getattr(torch, name)


# Rules for one operator each, or for a few that differ in a function


def _plain(function: Callable[..., Any]) -> Rule:
    """Operators whose arguments say everything."""
    return lambda call, ty, *operands: function(*operands)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    return _plain(lambda a, b: function(a, b))


def _divide(call: relax.Call, ty: Any, a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _conv2d(call: relax.Call, ty: Any, x: Tensor, weight: Tensor) -> Tensor:
    attrs = call.attrs
    if (attrs.data_layout, attrs.kernel_layout) != ("NCHW", "OIHW"):
        raise UnsupportedError(
            f"nn.conv2d in layout {attrs.data_layout} has no rule in PyTorch; run SimplifyModel first"
        )
    strides, dilation = _ints(attrs.strides), _ints(attrs.dilation)
    top, left, bottom, right = _ints(attrs.padding)
    padding = [top, left]
    if (top, left) != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), [0, 0]
    return F.conv2d(x, weight, None, strides, padding, dilation, int(attrs.groups))


def _attention(call: relax.Call, ty: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """``[B, T, H, D]``. Spelled out: PyTorch's own has no rule for ``vmap``."""
    attrs = call.attrs
    if attrs.window_size is not None:
        raise UnsupportedError("nn.attention with a window has no rule in PyTorch")
    scale = 1 / math.sqrt(q.shape[-1]) if attrs.scale is None else float(attrs.scale)
    scores = (q * scale).permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1)
    if bias is not None:
        scores = scores + bias
    if attrs.causal_mask is not None:
        rows, columns = scores.shape[-2:]
        offset = 0 if str(attrs.causal_mask) == "TopLeft" else columns - rows
        future = torch.ones(rows, columns, dtype=torch.bool).triu(offset + 1)
        scores = scores.masked_fill(future, -math.inf)
    return (scores.softmax(-1) @ v.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)


def _layer_norm(call: relax.Call, ty: Any, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    attrs = call.attrs
    axes = [a % x.ndim for a in _ints(attrs.axes)]
    if axes == list(range(x.ndim - len(axes), x.ndim)):
        weight, bias = (gamma if attrs.scale else None), (beta if attrs.center else None)
        return F.layer_norm(x, [x.shape[a] for a in axes], weight, bias, float(attrs.epsilon))
    centred = x - x.mean(axes, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + float(attrs.epsilon))
    return _scaled(normal, axes, gamma if attrs.scale else None, beta if attrs.center else None)


def _rms_norm(call: relax.Call, ty: Any, x: Tensor, gamma: Tensor) -> Tensor:
    axes = [a % x.ndim for a in _ints(call.attrs.axes)]
    normal = x * torch.rsqrt(x.square().mean(axes, keepdim=True) + float(call.attrs.epsilon))
    return _scaled(normal, axes, gamma, None)


def _group_norm(call: relax.Call, ty: Any, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    attrs = call.attrs
    axes = sorted(a % x.ndim for a in _ints(attrs.axes))
    if int(attrs.channel_axis) % x.ndim != 1 or axes != list(range(2, x.ndim)):
        raise UnsupportedError("nn.group_norm over other axes than channels and positions has no rule in PyTorch")
    weight, bias = (gamma if attrs.scale else None), (beta if attrs.center else None)
    return F.group_norm(x, int(attrs.num_groups), weight, bias, float(attrs.epsilon))


def _batch_norm(call: relax.Call, ty: Any, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    attrs = call.attrs
    if attrs.training:
        raise UnsupportedError("nn.batch_norm in training has no rule in PyTorch; export the model for inference")
    axis = [int(attrs.axis) % x.ndim]
    gamma, beta, mean, variance = parameters
    normal = _scaled(x, axis, None, -mean) * _along(torch.rsqrt(variance + float(attrs.epsilon)), axis, x.ndim)
    return _scaled(normal, axis, gamma if attrs.scale else None, beta if attrs.center else None), mean, variance


def _scaled(x: Tensor, axes: Sequence[int], gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    x = x if gamma is None else x * _along(gamma, axes, x.ndim)
    return x if beta is None else x + _along(beta, axes, x.ndim)


def _along(values: Tensor, axes: Sequence[int], rank: int) -> Tensor:
    """A tensor over these axes, to broadcast against one of ``rank``."""
    sizes = dict(zip(axes, values.shape, strict=True))
    return values.reshape([sizes.get(a, 1) for a in range(rank)])


def _max_pool2d(call: relax.Call, ty: Any, x: Tensor) -> Tensor:
    attrs = call.attrs
    x = F.pad(x, _pool_padding(call, ty, x), value=-math.inf)
    return F.max_pool2d(x, _ints(attrs.pool_size), _ints(attrs.strides), 0, _ints(attrs.dilation))


def _avg_pool2d(call: relax.Call, ty: Any, x: Tensor) -> Tensor:
    attrs = call.attrs
    if _ints(attrs.dilation) != [1, 1]:
        raise UnsupportedError("nn.avg_pool2d with dilation has no rule in PyTorch")
    padding = _pool_padding(call, ty, x)
    size, strides = _ints(attrs.pool_size), _ints(attrs.strides)
    mean = F.avg_pool2d(F.pad(x, padding), size, strides)
    if attrs.count_include_pad or not any(padding):
        return mean
    real = F.pad(torch.ones(1, 1, *x.shape[2:]), padding)
    return mean / F.avg_pool2d(real, size, strides)


def _pool_padding(call: relax.Call, ty: Any, x: Tensor) -> list[int]:
    """For ``F.pad``: the attribute's own, and what the last windows of ``ceil_mode`` reach beyond it."""
    attrs = call.attrs
    if str(attrs.layout) != "NCHW":
        raise UnsupportedError(f"a pool in layout {attrs.layout} has no rule in PyTorch; run SimplifyModel first")
    top, left, bottom, right = _ints(attrs.padding)
    reach = [
        (int(out) - 1) * stride + (size - 1) * dilation + 1
        for out, stride, size, dilation in zip(
            list(ty.shape)[2:], _ints(attrs.strides), _ints(attrs.pool_size), _ints(attrs.dilation), strict=True
        )
    ]
    below = max(bottom, reach[0] - x.shape[2] - top)
    beside = max(right, reach[1] - x.shape[3] - left)
    return [left, beside, top, below]


def _adaptive_avg_pool2d(call: relax.Call, ty: Any, x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, [int(d) for d in list(ty.shape)[2:]])


def _pad(call: relax.Call, ty: Any, x: Tensor) -> Tensor:
    attrs = call.attrs
    pairs = list(zip(*[iter(_ints(attrs.pad_width))] * 2, strict=True))
    mode = str(attrs.pad_mode)
    if mode != "constant":
        raise UnsupportedError(f"nn.pad in mode {mode} has no rule in PyTorch")
    return F.pad(x, [size for pair in reversed(pairs) for size in pair], value=float(attrs.pad_value))


def _reduction(function: Callable[..., Tensor]) -> Rule:
    def reduce(call: relax.Call, ty: Any, x: Tensor) -> Tensor:
        axes = list(range(x.ndim)) if call.attrs.axis is None else _ints(call.attrs.axis)
        return function(x, dim=axes, keepdim=bool(call.attrs.keepdims))

    return reduce


def _quantize(call: relax.Call, ty: Any, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    limits = torch.iinfo(torch_dtype(str(ty.dtype)))
    scale, zero_point = (_per_axis(values, x, call) for values in (scale, zero_point))
    return torch.clamp(rounded(x / scale) + zero_point, limits.min, limits.max)


def _dequantize(call: relax.Call, ty: Any, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    scale, zero_point = (_per_axis(values, x, call) for values in (scale, zero_point))
    return (x.float() - zero_point.float()) * scale


def _per_axis(values: Tensor, x: Tensor, call: relax.Call) -> Tensor:
    return values.reshape(()) if values.numel() == 1 else _along(values, [int(call.attrs.axis) % x.ndim], x.ndim)


def _permute_dims(call: relax.Call, ty: Any, x: Tensor) -> Tensor:
    axes = call.attrs.axes
    return x.permute(list(reversed(range(x.ndim))) if axes is None else _ints(axes))


def _expand_dims(call: relax.Call, ty: Any, x: Tensor) -> Tensor:
    rank = x.ndim + len(call.attrs.axis)
    for axis in sorted(a % rank for a in _ints(call.attrs.axis)):
        x = x.unsqueeze(axis)
    return x


def _squeeze(call: relax.Call, ty: Any, x: Tensor) -> Tensor:
    axes = call.attrs.axis
    return x.squeeze() if axes is None else x.squeeze([a % x.ndim for a in _ints(axes)])


def _concat(call: relax.Call, ty: Any, tensors: Sequence[Tensor]) -> Tensor:
    axis = call.attrs.axis
    return torch.cat([t.reshape(-1) for t in tensors]) if axis is None else torch.cat(list(tensors), int(axis))


def _stack(call: relax.Call, ty: Any, tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors), 0 if call.attrs.axis is None else int(call.attrs.axis))


def _split(call: relax.Call, ty: Any, x: Tensor) -> tuple[Tensor, ...]:
    how, axis = call.attrs.indices_or_sections, int(call.attrs.axis)
    if isinstance(how, tirx.IntImm):
        return tuple(torch.split(x, -(-x.shape[axis] // int(how)), axis))
    return tuple(torch.tensor_split(x, _ints(how), axis))


def _strided_slice(
    call: relax.Call, ty: Any, x: Tensor, axes: Any, begin: Any, end: Any, strides: Any = None
) -> Tensor:
    for i, axis in enumerate(axes):
        length = x.shape[axis]
        step = 1 if strides is None else strides[i]
        stop = None if step < 0 and end[i] < -length else end[i]
        x = x.index_select(axis, torch.arange(length)[list(range(*slice(begin[i], stop, step).indices(length)))])
    return x


def _take(call: relax.Call, ty: Any, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.attrs.axis
    x = x.reshape(-1) if axis is None else x
    axis = 0 if axis is None else int(axis) % x.ndim
    length, indices = x.shape[axis], indices.long()
    wraps = str(call.attrs.mode) == "wrap"
    indices = indices % length if wraps else indices.clamp(-length, length - 1)
    indices = torch.where(indices < 0, indices + length, indices)
    found = x.index_select(axis, indices.reshape(-1))
    return found.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def _prelu(call: relax.Call, ty: Any, x: Tensor, alpha: Tensor) -> Tensor:
    slope = alpha if alpha.numel() == 1 else _along(alpha.reshape(-1), [int(call.attrs.axis) % x.ndim], x.ndim)
    return torch.where(x < 0, x * slope, x)


def _full(call: relax.Call, ty: Any, shape: tuple[int, ...], value: Tensor) -> Tensor:
    return value.to(torch_dtype(str(ty.dtype))).expand(shape)


def _ints(values: Any) -> list[int]:
    """An attribute that is one number or several, as a list."""
    return [int(values)] if isinstance(values, int | tirx.IntImm) else [int(v) for v in values]


_TABLE: dict[str, Rule] = {
    # layers and what follows them
    "matmul": _plain(torch.matmul),
    "nn.conv2d": _conv2d,
    "nn.attention": _attention,
    "nn.attention_bias": _attention,
    "nn.layer_norm": _layer_norm,
    "nn.rms_norm": _rms_norm,
    "nn.group_norm": _group_norm,
    "nn.batch_norm": _batch_norm,
    "nn.softmax": lambda call, ty, x: torch.softmax(x, int(call.attrs.axis)),
    "nn.log_softmax": lambda call, ty, x: torch.log_softmax(x, int(call.attrs.axis)),
    "nn.max_pool2d": _max_pool2d,
    "nn.avg_pool2d": _avg_pool2d,
    "nn.adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "nn.pad": _pad,
    "quantize": _quantize,
    "dequantize": _dequantize,
    # elementwise
    "add": _binary(torch.add),
    "subtract": _binary(torch.subtract),
    "multiply": _binary(torch.multiply),
    "divide": _divide,
    "floor_divide": _binary(torch.floor_divide),
    "power": _binary(torch.pow),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "negative": _plain(torch.neg),
    "abs": _plain(torch.abs),
    "exp": _plain(torch.exp),
    "log": _plain(torch.log),
    "sqrt": _plain(torch.sqrt),
    "rsqrt": _plain(torch.rsqrt),
    "square": _plain(torch.square),
    "erf": _plain(torch.erf),
    "tanh": _plain(torch.tanh),
    "sigmoid": _plain(torch.sigmoid),
    "sin": _plain(torch.sin),
    "cos": _plain(torch.cos),
    "round": _plain(rounded),
    "clip": _plain(torch.clamp),
    "nn.relu": _plain(F.relu),
    "nn.gelu": _plain(F.gelu),
    "nn.gelu_tanh": _plain(lambda x: F.gelu(x, approximate="tanh")),
    "nn.silu": _plain(F.silu),
    "nn.softplus": lambda call, ty, x: F.softplus(x, float(call.attrs.beta), float(call.attrs.threshold)),
    "nn.leakyrelu": lambda call, ty, x: F.leaky_relu(x, float(call.attrs.alpha)),
    "nn.prelu": _prelu,
    "where": _plain(torch.where),
    "equal": _binary(torch.eq),
    "not_equal": _binary(torch.ne),
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "logical_not": _plain(torch.logical_not),
    "logical_and": _binary(torch.logical_and),
    "logical_or": _binary(torch.logical_or),
    "isnan": _plain(torch.isnan),
    "isinf": _plain(torch.isinf),
    "astype": lambda call, ty, x: x.to(torch_dtype(str(ty.dtype))),
    # reductions
    "sum": _reduction(torch.sum),
    "mean": _reduction(torch.mean),
    "max": _reduction(torch.amax),
    "min": _reduction(torch.amin),
    "variance": _reduction(lambda x, dim, keepdim: torch.var(x, dim, correction=0, keepdim=keepdim)),
    # moves
    "reshape": _plain(torch.reshape),
    "broadcast_to": _plain(torch.broadcast_to),
    "permute_dims": _permute_dims,
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "flatten": _plain(lambda x: x.reshape(-1)),
    "nn.batch_flatten": _plain(lambda x: x.reshape(x.shape[0], -1)),
    "concat": _concat,
    "stack": _stack,
    "split": _split,
    "strided_slice": _strided_slice,
    "take": _take,
    "flip": lambda call, ty, x: torch.flip(x, [int(call.attrs.axis)]),
    "full": _full,
    "zeros": lambda call, ty, shape: torch.zeros(shape, dtype=torch_dtype(str(ty.dtype))),
    "ones": lambda call, ty, shape: torch.ones(shape, dtype=torch_dtype(str(ty.dtype))),
}
