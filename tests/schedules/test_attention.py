"""The attention kernel against the formula in float64: shapes, batches, biases, keys in blocks, bytes out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import ALL_ISAS, RUNNABLE, garbage, run_kernel

from pumice.schedules.attention import Attention, Bias, Heads, Requantize, attention
from pumice.targets.isa import isa


def floats(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def define(q, k, v, scale, bias=None, guarded=False):
    """``[B, T, H, C]``; the scores are float32, as the bias that hides them would otherwise not absorb them."""
    wide = [x.astype(np.float64) for x in (q, k, v)]
    with np.errstate(all="ignore"):
        scores = (np.einsum("bthc,bshc->bhts", *wide[:2]) * scale).astype(np.float32)
        scores = scores if bias is None else scores + bias
        powers = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
        shares = powers / powers.sum(-1, keepdims=True)
        if guarded:
            shares = np.where((scores == -np.inf).all(-1, keepdims=True), 0, shares)
        return np.einsum("bhts,bshc->bthc", shares, wide[2])


def packed(x, before=0, after=0):
    """``[B, T, C]`` as rows, among others and at positions among others that hold NaN."""
    batch, length, channels = x.shape
    count = batch * length
    positions = 1 if count == 1 else -(-count // 16) * 16
    rows = np.full((before + channels + after, positions, 1), np.nan, np.float32)
    rows[before : before + channels, :count, 0] = x.reshape(count, channels).T
    return rows


def attend(isa_name, q, k, v, bias=None, *, guarded=False, requantize=None, before=0, gap=0, scale=0.3, threads=1):
    """The kernel on ``[B, T, H, C]``; ``gap`` rows lie between one head and the next."""

    def operand(x):
        batch, length, _, size = x.shape
        spread = np.pad(x, [(0, 0)] * 3 + [(0, gap)], constant_values=np.nan).reshape(batch, length, -1)
        rows = packed(spread, before)
        return rows, Heads(rows.shape[0], rows.shape[1], length, before, size + gap)

    arrays, layouts = zip(*(operand(x) for x in (q, k, v)), strict=True)
    spec = None
    if bias is not None:
        rows = packed(bias.reshape(1, -1, bias.shape[3]), after=3)
        arrays, spec = (*arrays, rows), Bias(rows.shape[0], rows.shape[1], *bias.shape[:3])
    batch, length, heads, size = q.shape
    work = Attention(batch, heads, size, v.shape[3], scale, *layouts, spec, guarded, requantize, threads)
    y = garbage(work.output_shape, "uint8" if requantize else "float32")
    y = run_kernel(attention(work, isa(isa_name)), isa_name, *arrays, y)
    untouched = y[: heads * v.shape[3] // (4 if requantize else 1), batch * length :]
    assert (untouched == garbage((1,), str(y.dtype))).all()
    channels = y.transpose(0, 2, 1).reshape(-1, y.shape[1])[: heads * v.shape[3], : batch * length]
    assert requantize or not y[heads * v.shape[3] :].any()
    return channels.T.reshape(batch, length, heads, v.shape[3])


def agree(y, want):
    # Sums of a few hundred products of numbers of about one, and powers within two units in the last place.
    np.testing.assert_allclose(y, want, rtol=2e-5, atol=2e-5)


@settings(max_examples=15)
@given(
    st.sampled_from(RUNNABLE), st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9),
    st.integers(1, 9), st.integers(1, 70), st.integers(1, 70), st.sampled_from(["none", "keys", "all", "heads"]),
)  # fmt: skip
def test_any_shape(isa_name, seed, batch, heads, size, value_size, queries, keys, kind):
    rng = np.random.default_rng(seed)
    q, k, v = (floats(rng, batch, t, heads, c) for t, c in ((queries, size), (keys, size), (keys, value_size)))
    shape = {"keys": (batch, 1, 1, keys), "all": (batch, heads, queries, keys), "heads": (1, heads, queries, keys)}
    bias = None if kind == "none" else floats(rng, *shape[kind]) * 3
    y = attend(isa_name, q, k, v, bias, before=seed % 3, gap=seed % 2 * 5)
    agree(y, define(q, k, v, 0.3, bias))


@pytest.mark.parametrize("isa_name", ALL_ISAS)
@pytest.mark.parametrize("queries, keys", [(128, 128), (75, 600), (3, 513)])
def test_tiles_and_blocks_of_keys(isa_name, queries, keys):
    rng = np.random.default_rng(1)
    q, k, v = (floats(rng, 2, t, 2, c) for t, c in ((queries, 8), (keys, 8), (keys, 6)))
    bias = floats(rng, 2, 1, queries, keys)
    bias[:, :, 0, :520] = -np.inf  # hidden up to the last block
    bias[:, :, 1] += 60 * (np.arange(keys) > keys // 2)  # what comes late outweighs all before
    bias = bias if keys == 600 else None
    agree(attend(isa_name, q * 30, k, v, bias, threads=2), define(q * 30, k, v, 0.3, bias))


@pytest.mark.parametrize("isa_name", ALL_ISAS)
@pytest.mark.parametrize("keys", [20, 300])
@pytest.mark.parametrize("guarded", [False, True])
def test_hidden_rows_and_nan(isa_name, keys, guarded):
    rng = np.random.default_rng(2)
    q, k, v = floats(rng, 1, 20, 1, 4), floats(rng, 1, keys, 1, 4), floats(rng, 1, keys, 1, 4)
    bias = np.zeros((1, 1, 20, keys), np.float32)
    bias[..., 0, :] = -np.inf  # nothing left
    bias[..., 1, :] = np.finfo(np.float32).min  # absorbs every score: all alike
    bias[..., 2, 1:] = -np.inf
    bias[..., 3, 5] = np.inf
    q[0, 4] = np.nan
    bias[..., 5, :] = np.nan
    y, want = attend(isa_name, q, k, v, bias, guarded=guarded), define(q, k, v, 0.3, bias, guarded)
    assert np.isnan(want[0, [3, 4, 5]]).all() and np.isnan(want[0, 0]).all() == (not guarded)
    agree(y, want)


@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_bytes_out(isa_name):
    rng = np.random.default_rng(3)
    q, k, v = (floats(rng, 2, 23, 3, 8) for _ in range(3))
    y = attend(isa_name, q, k, v, requantize=Requantize(150.0, 100))
    want = define(q, k, v, 0.3) * 150
    assert (np.abs(y - np.clip(want + 100, 0, 255)) <= 0.5 + 1e-3).all()
    assert y.min() == 0 and y.max() == 255  # some saturate
