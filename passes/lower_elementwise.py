"""Lowering elementwise operators: sums of packed bytes, and float32 functions on packed or plain tensors."""

from __future__ import annotations

import math

import numpy as np
from tvm import relax

from pumice.passes.elementwise_numpy import apply
from pumice.passes.packed import Builder, Packed
from pumice.passes.rewriting import shape_of
from pumice.schedules.elementwise import Add, add
from pumice.schedules.pointwise import Pointwise, pointwise


def lower_add(builder: Builder, var: relax.Var, call: relax.Call) -> bool:
    """Two packed uint8 tensors whose sum is quantized, with the activation between; otherwise as any other."""
    return _add_bytes(builder, var, call) or lower_elementwise(builder, var, call)


def _add_bytes(builder: Builder, var: relax.Var, call: relax.Call) -> bool:
    left, right = (builder.packed(operand) for operand in call.args)
    if left is None or right is None or left.geometry != right.geometry or left.channels != right.channels:
        return False
    if left.quant is None or right.quant is None or any(shape_of(o) != shape_of(var) for o in call.args):
        return False
    last, low, high = _activation_after(builder, var)
    quant = builder.graph.next_quant(last)
    if quant is None:
        return False
    words = left.rows * left.geometry.positions
    work = Add(
        words,
        left.quant.zero_point,
        float(np.float32(left.quant.scale / quant.scale)),
        right.quant.zero_point,
        float(np.float32(right.quant.scale / quant.scale)),
        quant.zero_point,
        quant.store(low),
        quant.store(high),
        builder.threads,
    )
    flat = [builder.emit(relax.op.reshape(v.expr, (words, 4)), "words") for v in (left, right)]
    total = builder.call(work, add, flat, (words, 4), "uint8")
    expr = builder.emit(relax.op.reshape(total, (left.rows, left.geometry.positions, 4)), "sum")
    result = Packed(expr, left.channels, left.geometry, quant)
    zero_is_kept = work.low <= quant.zero_point <= work.high or not left.geometry.is_padded
    builder.define(last, result if zero_is_kept else builder.repad(result))
    return True


def lower_elementwise(builder: Builder, var: relax.Var, call: relax.Call) -> bool:
    """float32, element by element: on packed operands, where it does not care how they lie, or on plain ones."""
    if str(var.ty.dtype) != "float32" or 0 in shape_of(var):
        return False
    return _elementwise_packed(builder, var, call) or _elementwise_plain(builder, var, call)


def _elementwise_packed(builder: Builder, var: relax.Var, call: relax.Call) -> bool:
    activations = [argument for argument in call.args if argument in builder.graph.flow.activations]
    values = [builder.packed(argument) for argument in activations]
    known = [value for value in values if value is not None and value.quant is None]
    numbers = [builder.graph.number(argument) for argument in call.args if argument not in activations]
    if len(known) != len(values) or None in numbers or len({(v.geometry, v.channels) for v in known}) != 1:
        return False
    if any(shape_of(argument) != shape_of(var) for argument in activations):
        return False
    first = known[0]
    if first.geometry.is_padded and not _keeps_zero(builder, var, call):
        return False
    kinds = tuple("full" if number is None else number for number in (builder.graph.number(a) for a in call.args))
    operator, kinds = builder.graph.flow.op(var), (*kinds, *_parameters(call))
    work = Pointwise(operator, first.rows, first.geometry.positions, kinds, builder.threads)
    size = first.rows * first.geometry.positions
    flat = [builder.emit(relax.op.reshape(value.expr, (size,)), "flat") for value in known]
    result = builder.call(work, pointwise, flat, (size,), "float32")
    expr = builder.emit(relax.op.reshape(result, (first.rows, first.geometry.positions, 1)), var.name)
    builder.define(var, Packed(expr, first.channels, first.geometry, None))
    return True


def _elementwise_plain(builder: Builder, var: relax.Var, call: relax.Call) -> bool:
    shape = shape_of(var)
    tensors: list[relax.Var] = []
    kinds: list[str | float] = []
    length = None
    for argument in call.args:
        number = builder.graph.number(argument)
        if number is not None:
            kinds.append(number)
            continue
        if not isinstance(argument, relax.Var) or str(argument.ty.dtype) != "float32":
            return False
        repeated = _repeated_length(shape_of(argument), shape)
        if repeated is None or (repeated and length not in (None, repeated)):
            return False
        length = repeated or length
        kinds.append("row" if repeated else "full")
        tensors.append(argument)
    size = math.prod(shape)
    length = length or _row_length(shape)
    operands = (*kinds, *_parameters(call))
    work = Pointwise(builder.graph.flow.op(var), size // length, length, operands, builder.threads)
    builder.call_on_rows(var, tensors, work, pointwise)
    return True


def _parameters(call: relax.Call) -> tuple[float, ...]:
    """The numbers that a function has besides its operands."""
    return (float(call.attrs.alpha),) if str(call.op.name) == "relax.nn.leakyrelu" else ()


def _row_length(shape: tuple[int, ...]) -> int:
    """Elements of the last axes, as many as fill some vectors; rows of them are what threads share."""
    length = 1
    for extent in reversed(shape):
        length *= extent
        if length >= _ROW_LENGTH:
            break
    return length


def _repeated_length(operand: tuple[int, ...], shape: tuple[int, ...]) -> int | None:
    """0 if the operand has the result's shape; the length of its row if that repeats; None for other broadcasts."""
    if operand == shape:
        return 0
    while operand and operand[0] == 1:
        operand = operand[1:]
    length = math.prod(operand)
    is_suffix = operand == shape[len(shape) - len(operand) :] if operand else False
    return length if is_suffix else None


def _keeps_zero(builder: Builder, var: relax.Var, call: relax.Call) -> bool:
    """Whether padding that holds zero still does afterwards."""
    numbers = [builder.graph.number(argument) for argument in call.args]
    value = apply(call, var, [np.asarray(0.0 if number is None else number) for number in numbers])
    return value is not None and not np.any(value)


def _activation_after(builder: Builder, var: relax.Var) -> tuple[relax.Var, float, float]:
    """The activations that alone read ``var``: the last one's variable, and the clamp they make."""
    graph, low, high = builder.graph, float("-inf"), float("inf")
    while (user := graph.flow.only_user(var)) is not None:
        clamp = graph.clamp(user, low, high)
        if clamp is None:
            break
        var, (low, high) = user, clamp
    return var, low, high


_ROW_LENGTH = 64
