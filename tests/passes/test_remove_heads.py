import numpy as np
import pytest
from coupled import NETWORKS, attention
from network import Network
from running import random_feed, run_compiled

from pumice.errors import UsageError
from pumice.module import layers_of, weights_of, with_weights
from pumice.passes import Prune, RecordLayers
from pumice.passes.remove_heads import RemoveHeads

HEADS, SIZE = 4, 4  # of the attention in tests/coupled.py, of width 16


def silenced(heads):
    """The network whose output projection has no rows for these heads: they add nothing."""
    mod = RecordLayers()(NETWORKS["transformer"]())
    weights = {name: array.copy() for name, array in weights_of(mod).items()}
    for head in heads:
        weights["att.out.weight"][head * SIZE : (head + 1) * SIZE] = 0
    return with_weights(mod, weights)


@pytest.mark.parametrize("heads", [(1,), (0, 3)])
@pytest.mark.parametrize("with_samples", [False, True])
def test_heads_that_add_nothing_go_and_nothing_changes(heads, with_samples):
    mod = silenced(heads)
    samples = random_feed(mod, 6, 1) if with_samples else None
    after = RemoveHeads(f"heads:{len(heads) / HEADS}", samples)(mod)
    left = (HEADS - len(heads)) * SIZE
    kept = [i for head in range(HEADS) if head not in heads for i in range(head * SIZE, (head + 1) * SIZE)]
    for name in ("att.q.weight", "att.k.weight", "att.v.weight"):
        np.testing.assert_array_equal(weights_of(after)[name], weights_of(mod)[name][:, kept])
    assert weights_of(after)["att.out.weight"].shape == (left, 16)
    for a, b in zip(run_compiled(after, random_feed(mod)), run_compiled(mod, random_feed(mod)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def lone_attention():
    net = Network()
    return RecordLayers()(net.finish(y=attention(net, "att", net.input("x", (1, 5, 16)), HEADS)))


def parts_by_hand(weights, x):
    """What each head adds to the output of ``lone_attention`` on ``x [T, 16]``: ``[heads, T, 16]``."""
    q, k, v = (x @ weights[f"att.{part}.weight"] + weights[f"att.{part}.bias"] for part in "qkv")
    parts = []
    for first in range(0, q.shape[1], SIZE):
        own = slice(first, first + SIZE)
        scores = np.exp(0.3 * q[:, own] @ k[:, own].T)
        parts.append(scores / scores.sum(1, keepdims=True) @ v[:, own] @ weights["att.out.weight"][own])
    return np.array(parts)


@pytest.mark.parametrize("with_samples", [False, True])
def test_the_rest_is_attention_by_hand_without_the_weakest_head(with_samples):
    mod = lone_attention()
    old = weights_of(mod)
    samples = random_feed(mod, 8, 1)
    if with_samples:
        strength = sum(np.square(parts_by_hand(old, x)).sum((1, 2)) for x in samples["x"])
    else:
        strength = np.square(old["att.out.weight"]).reshape(HEADS, -1).sum(1)
    kept = [head for head in range(HEADS) if head != np.argmin(strength)]
    after = RemoveHeads("heads:0.25", samples if with_samples else None, update_weights=False)(mod)
    x = random_feed(mod)["x"][0]
    expected = parts_by_hand(old, x)[kept].sum(0) + old["att.out.bias"]
    if with_samples:  # the mean of what is gone is in the bias
        expected = expected + np.mean([parts_by_hand(old, s)[np.argmin(strength)] for s in samples["x"]], (0, 1))
    np.testing.assert_allclose(run_compiled(after, {"x": x[None]})[0][0], expected, rtol=1e-3, atol=1e-4)


def test_one_head_stays():
    after = RemoveHeads("heads:1")(RecordLayers()(NETWORKS["transformer"]()))
    assert weights_of(after)["att.q.weight"].shape == (16, SIZE)


def test_what_is_kept_says_so():
    after = RemoveHeads("heads:0.5:keep=att.q")(RecordLayers()(NETWORKS["transformer"]()))
    assert weights_of(after)["att.q.weight"].shape == (16, 16)
    assert any("keep=att.q" in note for note in layers_of(after)["att.q"].notes)


def test_records_say_what_is_left():
    records = layers_of(RemoveHeads("heads:0.5")(RecordLayers()(NETWORKS["transformer"]())))
    assert "8 of 16 output channels left" in records["att.v"].notes
    assert records["att.v"].pruned_by == "heads:0.5"


def test_other_specifications_are_refused():
    with pytest.raises(UsageError, match="removes no attention heads"):
        RemoveHeads("filters:0.5")
    with pytest.raises(UsageError, match="changes the network's shape"):
        Prune("heads:0.5")
