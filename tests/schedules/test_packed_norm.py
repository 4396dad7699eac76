"""Norms down the rows of packed float32: exactly the definition, floats and bytes."""

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import ALL_ISAS, RUNNABLE, garbage, run_kernel_for

from pumice.schedules.packed_norm import PackedNorm, packed_norm
from pumice.targets.isa import isa

SCALE, ZERO_POINT, EPSILON = 0.02, 120, 1e-5


def run(isa_name, x, gamma, beta, *, floats=True, quantized=True, threads=1):
    """The norm of tokens ``x`` [T, C]: float32 [T, C] and uint8 [T, C], None for what is not written."""
    tokens, channels = x.shape
    positions, rows = -(-tokens // 16) * 16 + 16, -(-channels // 4) * 4
    packed = np.full((rows, positions, 1), np.nan, np.float32)
    packed[:channels, :tokens, 0] = x.T
    multiplier = float(np.float32(1 / SCALE)) if quantized else None
    work = PackedNorm(channels, positions, tokens, EPSILON, beta is not None, floats, multiplier, ZERO_POINT, threads)
    vectors = [np.pad(v, (0, rows - channels)) for v in (gamma, beta) if v is not None]
    kernel = packed_norm(work, isa(isa_name))
    y, q = garbage(packed.shape, "float32"), garbage((rows // 4, positions, 4), "uint8")
    written = [array for array, is_written in ((y, floats), (q, quantized)) if is_written]
    results = run_kernel_for(kernel, isa_name, packed, *vectors, *written, outputs=len(written))
    y = results[0][:channels, :tokens, 0].T if floats else None
    q = results[-1].transpose(0, 2, 1).reshape(rows, positions)[:channels, :tokens].T if quantized else None
    return y, q


def check(isa_name, seed, tokens, channels, centres, floats, quantized, threads=1):
    rng = np.random.default_rng(seed)
    x, gamma, beta = (rng.standard_normal(s).astype(np.float32) for s in ((tokens, channels), channels, channels))
    x = x * 3 + 7
    y, q = run(isa_name, x, gamma, beta if centres else None, floats=floats, quantized=quantized, threads=threads)
    want = reference.norm32(x, gamma, beta if centres else None, EPSILON)
    if floats:
        np.testing.assert_array_equal(y, want)
    if quantized:
        np.testing.assert_array_equal(q, reference.norm_u8(want, SCALE, ZERO_POINT))


@settings(max_examples=25)
@given(
    st.sampled_from(RUNNABLE), st.integers(0, 10**6), st.integers(1, 90), st.integers(1, 21), st.booleans(),
    st.sampled_from([(True, True), (True, False), (False, True)]),
)  # fmt: skip
def test_norms_equal_the_definition(isa_name, seed, tokens, channels, centres, written):
    check(isa_name, seed, tokens, channels, centres, *written)


@pytest.mark.parametrize("isa_name", ALL_ISAS)
@pytest.mark.parametrize("centres", [True, False])
def test_every_instruction_set_gives_the_same_numbers(isa_name, centres):
    check(isa_name, 2, 37, 50, centres, True, True)


def test_threads_change_nothing():
    check(RUNNABLE[0], 3, 300, 400, True, True, True, threads=2)


def test_it_is_layer_norm():
    rng = np.random.default_rng(4)
    x = (rng.standard_normal((20, 300)) * 3 + 50).astype(np.float32)
    x[1] = 4.0  # no variance: epsilon carries
    gamma, beta = rng.standard_normal((2, 300)).astype(np.float32)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + EPSILON) * gamma + beta
    np.testing.assert_allclose(run(RUNNABLE[0], x, gamma, beta)[0], want, rtol=1e-4, atol=1e-4)
    want = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + EPSILON) * gamma
    np.testing.assert_allclose(run(RUNNABLE[0], x, gamma, None)[0], want, rtol=1e-5, atol=1e-5)
