"""Float kernels on plain tensors: products of activations, softmax, layer norm, and the exponential under them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import ALL_ISAS, RUNNABLE, garbage, run_kernel

from pumice.schedules import emit
from pumice.schedules.matmul import Matmul, matmul
from pumice.schedules.normalization import LayerNorm, Softmax, layer_norm, softmax
from pumice.targets.isa import isa


def floats(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@settings(max_examples=25)
@given(
    st.sampled_from(RUNNABLE), st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 10), st.integers(1, 75),
    st.integers(1, 40), st.booleans(),
)  # fmt: skip
def test_matmul_is_close_to_the_definition(isa_name, seed, batch, m, n, k, shared):
    rng = np.random.default_rng(seed)
    a, b = floats(rng, batch, m, k), floats(rng, 1 if shared else batch, k, n)
    work = Matmul(batch, m, n, k, shared)
    c = run_kernel(matmul(work, isa(isa_name)), isa_name, a.ravel(), b.ravel(), garbage((batch * m * n,), "float32"))
    want = a.astype(np.float64) @ b
    np.testing.assert_allclose(c.reshape(want.shape), want, rtol=1e-5, atol=1e-5 * np.sqrt(k))


@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_matmul_on_every_instruction_set(isa_name):
    rng = np.random.default_rng(1)
    a, b = floats(rng, 2, 7, 19), floats(rng, 2, 19, 53)
    c = run_kernel(matmul(Matmul(2, 7, 53, 19), isa(isa_name)), isa_name, a.ravel(), b.ravel(),
                   garbage((2 * 7 * 53,), "float32"))  # fmt: skip
    np.testing.assert_allclose(c.reshape(2, 7, 53), a.astype(np.float64) @ b, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("isa_name", ALL_ISAS)
@pytest.mark.parametrize("length", [1, 5, 16, 37, 128])
def test_softmax(isa_name, length):
    x = floats(np.random.default_rng(2), 6, length) * 20
    x[1] = 1e4 + np.arange(length)  # large numbers do not overflow
    x[2, 1:] = -np.inf  # masked
    x[3] = -1e4
    y = run_kernel(softmax(Softmax(6, length), isa(isa_name)), isa_name, x.ravel(), garbage((x.size,), "float32"))
    shifted = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    want = shifted / shifted.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(y.reshape(x.shape), want, rtol=5e-6 * np.sqrt(length), atol=1e-30)


@pytest.mark.parametrize("isa_name", ALL_ISAS)
@pytest.mark.parametrize("length", [3, 16, 37])
def test_softmax_of_what_has_none_is_nan(isa_name, length):
    x = floats(np.random.default_rng(4), 5, length)
    x[0, 0], x[1, length - 1], x[2, length // 2] = np.nan, np.nan, np.inf
    x[3] = -np.inf
    y = run_kernel(softmax(Softmax(5, length), isa(isa_name)), isa_name, x.ravel(), garbage((x.size,), "float32"))
    assert np.isnan(y.reshape(x.shape)[:4]).all() and np.isfinite(y.reshape(x.shape)[4]).all()


@pytest.mark.parametrize("isa_name", ALL_ISAS)
@pytest.mark.parametrize("length", [1, 7, 32, 100])
def test_layer_norm(isa_name, length):
    rng = np.random.default_rng(3)
    x, gamma, beta = floats(rng, 5, length) * 3 + 50, floats(rng, length), floats(rng, length)
    x[1] = 4.0  # no variance: epsilon carries
    work = LayerNorm(5, length, 1e-5)
    y = run_kernel(layer_norm(work, isa(isa_name)), isa_name, x.ravel(), gamma, beta, garbage((x.size,), "float32"))
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * gamma + beta
    np.testing.assert_allclose(y.reshape(x.shape), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_exponential_is_within_two_units_in_the_last_place(isa_name):
    lanes = isa(isa_name).lanes
    x = np.concatenate([np.linspace(-87.3, 88.3, 1600), [0.0] * 8, [-1e-6] * 8]).astype(np.float32)

    def body():
        a, b = emit.arguments(a=((len(x),), "float32"), b=((len(x),), "float32"))
        emit.for_strips(len(x), lanes, lambda i, n: emit.store(b, i, emit.exp(emit.load(a, i, n), n), n))

    y = run_kernel(emit.kernel("exp", body), isa_name, x, garbage(x.shape, "float32"))
    want = np.exp(x.astype(np.float64))
    assert (np.abs(y - want) <= 2 * np.spacing(want.astype(np.float32))).all()


@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_exponential_saturates_beyond_its_range(isa_name):
    x = np.array([-np.inf, -1e30, -90, 89, 1e30, np.inf, 0, 0], np.float32)

    def body():
        a, b = emit.arguments(a=((8,), "float32"), b=((8,), "float32"))
        emit.store(b, 0, emit.exp(emit.load(a, 0, 4), 4), 4)
        emit.store(b, 4, emit.exp(emit.load(a, 4, 4), 4), 4)

    y = run_kernel(emit.kernel("exp", body), isa_name, x, garbage((8,), "float32"))
    assert (y[:3] < 2e-38).all() and (y[:3] >= 0).all()
    assert (y[3:6] > 2e38).all() and np.isfinite(y[3:6]).all()
    assert (y[6:] == 1).all()


@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_exponential_of_nan_is_nan(isa_name):
    def body():
        a, b = emit.arguments(a=((4,), "float32"), b=((4,), "float32"))
        emit.store(b, 0, emit.exp(emit.load(a, 0, 4), 4), 4)

    x = np.array([np.nan, 0, -np.nan, 0], np.float32)
    y = run_kernel(emit.kernel("exp", body), isa_name, x, garbage((4,), "float32"))
    np.testing.assert_array_equal(y, [np.nan, 1, np.nan, 1])


@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_rounding_is_half_to_even_and_saturates(isa_name):
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, np.inf, -np.inf, 254.5, 255.5, 0, 0, 0, 0, 0], np.float32)

    def body():
        a, b = emit.arguments(a=((16,), "float32"), b=((16,), "int32"))

        def strip(i, n):
            emit.store(b, i, emit.round_to_int(emit.load(a, i, n), 0, 255, 3, n), n)

        emit.for_strips(16, isa(isa_name).lanes, strip)

    y = run_kernel(emit.kernel("round", body), isa_name, x, garbage((16,), "int32"))
    np.testing.assert_array_equal(y[:11], np.clip(np.rint(x[:11].astype(np.float64)) + 3, 0, 255))
