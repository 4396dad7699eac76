"""FuseAttention on the ways in which models and exporters spell attention, and what it must leave alone."""

import math

import numpy as np
import pytest
from scripted import assert_rewrites, assert_same_numbers, bindings, scripted
from tvm import relax
from tvm.relax import op
from tvm.script import tirx as T

from pumice.passes import FuseAttention

B, LENGTH, H, C = 2, 5, 3, 4
LOWEST = float(np.finfo(np.float32).min)


def c(value):
    return relax.const(value, "float32")


def module(build, shape=(B, LENGTH, 3 * H * C), extra=()):
    """``build(emit, x, *extra)`` of inputs of these shapes; float32, or bool where the shape ends in True."""
    inputs = [relax.Var("x", relax.TensorType(shape, "float32"))]
    for i, other in enumerate(extra):
        kind = "bool" if other[-1] is True else "float32"
        inputs.append(relax.Var(f"m{i}", relax.TensorType(other[:-1] if kind == "bool" else other, kind)))
    builder = relax.BlockBuilder()
    with builder.function("main", inputs, attrs={"num_input": len(inputs)}):
        with builder.dataflow():
            result = builder.emit_output(build(builder.emit, *inputs))
        builder.emit_func_output(result)
    return scripted(builder.get())


def split_heads(e, x):
    """q, k, v ``[B, H, T, C]`` of one projection."""
    parts = e(op.split(x, 3, axis=2))
    shaped = [e(op.reshape(e(relax.TupleGetItem(parts, i)), (B, LENGTH, H, C))) for i in range(3)]
    return [e(op.permute_dims(part, [0, 2, 1, 3])) for part in shaped]


def keys_last(e, k):
    return e(op.permute_dims(k, [0, 1, 3, 2]))


def weighted(e, scores, v):
    o = e(op.matmul(e(op.nn.softmax(scores, axis=-1)), v))
    return op.reshape(e(op.permute_dims(o, [0, 2, 1, 3])), (B, LENGTH, H * C))


def one_projection(e, x):
    q, k, v = split_heads(e, x)
    return weighted(e, e(op.matmul(e(op.multiply(c(0.25), q)), keys_last(e, k))), v)


def heads_of_three(e, x):
    """Each head's q, k and v side by side."""
    t = e(op.permute_dims(e(op.reshape(x, (B, LENGTH, H, 3, C))), [3, 0, 2, 1, 4]))
    q, k, v = (e(op.take(t, relax.const(i, "int64"), axis=0)) for i in range(3))
    return weighted(e, e(op.matmul(q, keys_last(e, k))), v)


def scaled_on_both_sides(e, x):
    q, k, v = split_heads(e, x)
    return weighted(e, e(op.matmul(e(op.multiply(q, c(0.5))), e(op.multiply(keys_last(e, k), c(0.5))))), v)


def one_axis_for_batch_and_heads(e, x):
    q, k, v = (e(op.reshape(part, (B * H, LENGTH, C))) for part in split_heads(e, x))
    scores = e(op.matmul(q, e(op.permute_dims(k, [0, 2, 1]))))
    o = e(op.matmul(e(op.nn.softmax(scores, axis=-1)), v))
    o = e(op.permute_dims(e(op.reshape(o, (B, H, LENGTH, C))), [0, 2, 1, 3]))
    return op.reshape(o, (B, LENGTH, H * C))


def test_projections_and_mask():
    def heads(e, *projections):
        return [e(op.reshape(x, (B, int(x.ty.shape[1]), H, C))) for x in projections]

    def spelled_out(e, x, y, z, mask):
        q, k, v = (
            e(op.permute_dims(part, order))
            for part, order in zip(heads(e, x, y, z), ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
        )
        return weighted(e, e(op.add(e(op.divide(e(op.matmul(q, k)), c(2.0))), mask)), v)

    def fused(e, x, y, z, mask):
        attention = e(op.nn.attention(*heads(e, x, y, z), mask, scale=T.FloatImm("float32", 0.5)))
        return op.reshape(attention, (B, LENGTH, H * C))

    keys = (B, 7, H * C)
    before, expected = (module(build, (B, LENGTH, H * C), (keys, keys, (B, 1, 1, 7))) for build in (spelled_out, fused))
    assert_same_numbers(before, assert_rewrites(before, expected, FuseAttention()))


@pytest.mark.parametrize(
    "form", [one_projection, heads_of_three, scaled_on_both_sides, one_axis_for_batch_and_heads]
)  # fmt: skip
def test_forms(form):
    before = module(form)
    after = FuseAttention()(before)
    assert "permute_dims" not in bindings(after) and "matmul" not in bindings(after)
    assert bindings(after)[-2:] == ["nn.attention", "reshape"]
    assert_same_numbers(before, after)


def masked(hidden, swapped=False):
    def build(e, x, mask):
        q, k, v = split_heads(e, x)
        scores = e(op.matmul(q, keys_last(e, k)))
        choices = (c(hidden), scores) if swapped else (scores, c(hidden))
        return weighted(e, e(op.where(mask, *choices)), v)

    return build


@pytest.mark.parametrize("hidden, swapped", [(LOWEST, False), (-math.inf, True)])
def test_masks_become_biases(hidden, swapped):
    before = module(masked(hidden, swapped), extra=[(B, 1, LENGTH, LENGTH, True)])
    after = FuseAttention()(before)
    assert bindings(after)[-2:] == ["nn.attention_bias", "reshape"]
    if math.isfinite(hidden):
        assert_same_numbers(before, after)


def guarded_by_nan(e, x, mask):
    q, k, v = split_heads(e, x)
    p = e(op.nn.softmax(e(op.add(e(op.matmul(q, keys_last(e, k))), mask)), axis=-1))
    p = e(op.where(e(op.isnan(p)), c(0.0), p))
    return op.reshape(e(op.permute_dims(e(op.matmul(p, v)), [0, 2, 1, 3])), (B, LENGTH, H * C))


def guarded_by_max(e, x, mask):
    q, k, v = split_heads(e, x)
    s = e(op.add(e(op.matmul(q, keys_last(e, k))), mask))
    some = e(op.max(e(op.astype(e(op.not_equal(s, c(-math.inf))), "int8")), [-1], keepdims=True))
    p = e(op.nn.softmax(s, axis=-1))
    p = e(op.where(e(op.equal(some, relax.const(0, "int8"))), c(0.0), p))
    return op.reshape(e(op.permute_dims(e(op.matmul(p, v)), [0, 2, 1, 3])), (B, LENGTH, H * C))


@pytest.mark.parametrize("form", [guarded_by_nan, guarded_by_max])
def test_guards_against_hidden_rows(form):
    before = module(form, extra=[(B, 1, LENGTH, LENGTH)])
    after = FuseAttention()(before)
    guard = ["not_equal", "astype", "max", "equal", "permute_dims", "where"]
    assert bindings(after)[-8:] == ["nn.attention_bias", *guard, "reshape"]
    assert_same_numbers(before, after)


def test_what_is_not_attention_is_left_alone():
    def probabilities_read_twice(e, x):
        q, k, v = split_heads(e, x)
        p = e(op.nn.softmax(e(op.matmul(q, keys_last(e, k))), axis=-1))
        return op.add(e(op.matmul(p, v)), e(op.sum(p, [-1], keepdims=True)))

    def over_queries(e, x):
        q, k, v = split_heads(e, x)
        return op.matmul(e(op.nn.softmax(e(op.matmul(q, keys_last(e, k))), axis=2)), v)

    def hidden_by_little(e, x):
        mask = relax.const(np.tril(np.ones((LENGTH, LENGTH), bool)))
        q, k, v = split_heads(e, x)
        return op.matmul(e(op.nn.softmax(e(op.where(mask, e(op.matmul(q, keys_last(e, k))), c(-5.0))), axis=-1)), v)

    def bias_for_each_query(e, x):
        q, k, v = split_heads(e, x)
        bias = relax.const(np.ones((LENGTH, 1), np.float32))
        return op.matmul(e(op.nn.softmax(e(op.add(e(op.matmul(q, keys_last(e, k))), bias)), axis=-1)), v)

    for form in (probabilities_read_twice, over_queries, hidden_by_little, bias_for_each_query):
        assert not any("attention" in name for name in bindings(FuseAttention()(module(form))))


def test_operands_that_do_not_lie_like_heads_keep_their_order():
    def build(e, x):
        q, k, v = split_heads(e, x)
        turned = e(op.multiply(q, relax.const(np.arange(C, dtype=np.float32))))
        return weighted(e, e(op.matmul(turned, keys_last(e, k))), v)

    before = module(build)
    after = FuseAttention()(before)
    assert "nn.attention" in bindings(after)
    assert_same_numbers(before, after)
