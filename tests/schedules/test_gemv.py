"""A matrix times one vector, or a few, against the definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import ALL_ISAS, RUNNABLE, fold_zero_point, multiply_by
from reference import Residual as ReferenceResidual
from reference import layer_float32, linear_accumulate, linear_int8

from pumice.schedules.epilogue import Epilogue, Residual
from pumice.schedules.gemv import MOST_POSITIONS
from pumice.targets.isa import isa


def matrix(rng, n, k, density):
    """int8 ``[N, K]``, blocks of four missing; one row empty, one full."""
    keep = rng.random((n, -(-k // 4))) < density
    keep[0], keep[-1] = False, True
    return (rng.integers(-128, 128, (n, k)) * np.repeat(keep, 4, axis=1)[:, :k]).astype(np.int8)


def check_int8(
    isa_name, seed, n, k, sparse, *, positions=None, zx=3, zy=5, residual=False, clamp=(0, 255), output="uint8"
):
    rng = np.random.default_rng(seed)
    several = () if positions is None else (positions,)
    weight = matrix(rng, n, k, 0.3 if sparse else 1.0)
    x = rng.integers(0, 256, (*several, k)).astype(np.uint8)
    bias = rng.integers(-3000, 3000, n).astype(np.int32)
    m = (rng.random(n) * 2e-3 / np.sqrt(k)).astype(np.float32)
    numbers = {"sparse": sparse, "bias": fold_zero_point(weight, bias, zx), "m": m}
    if output == "float32":
        epilogue = Epilogue("float32", None, 0, float("-inf"), float("inf"))
        got = multiply_by(isa_name, x, weight, epilogue=epilogue, **numbers)
        np.testing.assert_array_equal(got, layer_float32(linear_accumulate(x, zx, weight.T, bias), m))
        return
    other = rng.integers(0, 256, (*several, n)).astype(np.uint8) if residual else None
    spec = Residual(float(np.float32(0.37)), 129) if residual else None
    got = multiply_by(isa_name, x, weight, epilogue=Epilogue("uint8", spec, zy, *clamp), residual=other, **numbers)
    reference = ReferenceResidual(other, spec.zero_point, spec.multiplier) if residual else None
    np.testing.assert_array_equal(got, linear_int8(x, zx, weight.T, bias, m, zy, reference, *clamp))


@settings(max_examples=60)
@given(
    isa_name=st.sampled_from(RUNNABLE),
    seed=st.integers(0, 10**6),
    n=st.integers(1, 70),
    k=st.integers(1, 600),
    positions=st.integers(1, MOST_POSITIONS),
    sparse=st.booleans(),
    zx=st.sampled_from([0, 128, 255]),
    zy=st.sampled_from([0, 7, 255]),
    residual=st.booleans(),
    clamp=st.sampled_from([(0, 255), (7, 99)]),
    output=st.sampled_from(["uint8", "uint8", "float32"]),
)
def test_int8_equals_the_definition(isa_name, seed, n, k, positions, sparse, zx, zy, residual, clamp, output):
    check_int8(
        isa_name, seed, n, k, sparse, positions=positions, zx=zx, zy=zy, residual=residual, clamp=clamp, output=output
    )


@pytest.mark.parametrize("isa_name", ALL_ISAS)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("positions", [1, 5])
def test_every_instruction_set_gives_the_same_integers(isa_name, sparse, positions):
    check_int8(isa_name, 1, 37, 51, sparse, positions=positions, residual=True)


@pytest.mark.parametrize("isa_name", ALL_ISAS)
@pytest.mark.parametrize("sparse", [False, True])
def test_one_output(isa_name, sparse):
    check_int8(isa_name, 2, 1, 13, sparse)


@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_extremes_do_not_saturate(isa_name):
    weight, x = np.full((5, 64), -128, np.int8), np.full(64, 255, np.uint8)
    epilogue = Epilogue("float32", None, 0, float("-inf"), float("inf"))
    one = np.ones(5, np.float32)
    for sparse in (False, True):
        got = multiply_by(isa_name, x, weight, sparse=sparse, bias=np.zeros(5, np.int32), m=one, epilogue=epilogue)
        assert (got == -128 * 255 * 64).all()


@pytest.mark.parametrize("isa_name", ALL_ISAS[:1] + ALL_ISAS[-1:])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_weight_of_zeros_leaves_the_bias(isa_name, sparse):
    bias = np.arange(9, dtype=np.int32)
    got = multiply_by(isa_name, np.full(8, 200, np.uint8), np.zeros((9, 8), np.int8), sparse=sparse, bias=bias,
                      m=np.ones(9, np.float32), epilogue=Epilogue("uint8", None, 1))  # fmt: skip
    np.testing.assert_array_equal(got, bias + 1)


@settings(max_examples=15)
@given(
    isa_name=st.sampled_from(RUNNABLE),
    seed=st.integers(0, 10**6),
    n=st.integers(1, 40),
    k=st.integers(1, 200),
    positions=st.integers(1, MOST_POSITIONS),
    sparse=st.booleans(),
    residual=st.booleans(),
)
def test_float_is_close_to_the_definition(isa_name, seed, n, k, positions, sparse, residual):
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((n, k)) * (rng.random((n, k)) < 0.5)).astype(np.float32)
    x, bias = rng.standard_normal((positions, k)).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    other = rng.standard_normal((positions, n)).astype(np.float32) if residual else None
    epilogue = Epilogue("float32", Residual() if residual else None, 0, 0.0, float("inf"))
    got = multiply_by(isa_name, x, weight, sparse=sparse, bias=bias, epilogue=epilogue, residual=other)
    want = x.astype(np.float64) @ weight.T + bias + (0 if other is None else other)
    np.testing.assert_allclose(got, np.maximum(want, 0), rtol=1e-5, atol=1e-5 * np.sqrt(k) * 3)


@pytest.mark.parametrize("isa_name", ALL_ISAS)
@pytest.mark.parametrize(("slices", "positions"), [(3, 1), (8, 1), (9, 1), (17, 1), (5, 2), (7, 4), (8, 8)])
def test_dense_panels_of_every_size(isa_name, slices, positions):
    check_int8(isa_name, 3, slices * isa(isa_name).lanes - 3, 37, False, positions=positions, residual=True)


# The second is narrower than a window.
@pytest.mark.parametrize(("n", "k", "positions"), [(1300, 1200, 1), (5300, 250, 1), (700, 900, 3)])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(n, k, positions, sparse, threads):
    rng = np.random.default_rng(5)
    weight, x = matrix(rng, n, k, 0.97), rng.integers(0, 256, (positions, k)).astype(np.uint8)
    got = multiply_by(RUNNABLE[0], x, weight, sparse=sparse, bias=np.arange(n, dtype=np.int32), threads=threads,
                      m=np.ones(n, np.float32), epilogue=Epilogue("float32", None, 0, -np.inf, np.inf))  # fmt: skip
    np.testing.assert_array_equal(got, x @ weight.astype(np.int32).T + np.arange(n))


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_rows_of_very_different_lengths(isa_name, density):
    """Whole rows, empty rows and words that crowd at one end: windows that hardly move and windows that leap."""
    rng = np.random.default_rng(6)
    n, k = 150, 1500
    keep = rng.random((n, k // 4)) < density
    keep[::7], keep[1::7], keep[2::7, : k // 8], keep[3::7, k // 8 :] = True, False, True, False
    weight = (rng.integers(-128, 128, (n, k)) * np.repeat(keep, 4, axis=1)).astype(np.int8)
    x, bias = rng.integers(0, 256, k).astype(np.uint8), rng.integers(-99, 99, n).astype(np.int32)
    got = multiply_by(isa_name, x, weight, sparse=True, bias=bias, m=np.ones(n, np.float32),
                      epilogue=Epilogue("float32", None, 0, -np.inf, np.inf))  # fmt: skip
    np.testing.assert_array_equal(got, weight.astype(np.int32) @ x + bias)
