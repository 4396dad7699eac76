"""The reference itself, against exact rational arithmetic and against loops that follow its own docstring."""

from fractions import Fraction

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def exact_rounding(value: Fraction) -> np.float32:
    """The float32 nearest to a rational, ties to even, by search among neighbours."""
    if value == 0:
        return np.float32(0)
    largest = Fraction(float(np.finfo(np.float32).max))
    limit = largest + Fraction(2) ** 103  # half a unit in the last place beyond: rounds to infinity
    if abs(value) >= limit:
        return np.float32(np.inf if value > 0 else -np.inf)
    if abs(value) > largest:
        return np.float32(largest if value > 0 else -largest)
    start = np.float32(float(value))  # float() of a Fraction is correctly rounded to float64
    if np.isinf(start):
        start = np.float32(np.copysign(np.finfo(np.float32).max, start))
    with np.errstate(over="ignore"):
        around = [start, np.nextafter(start, np.float32(-np.inf)), np.nextafter(start, np.float32(np.inf))]
    around = [candidate for candidate in around if np.isfinite(candidate)]
    return min(around, key=lambda f: (abs(Fraction(float(f)) - value), int(f.view(np.int32)) & 1))


@settings(max_examples=1000, deadline=None)
@given(FLOATS, FLOATS, FLOATS)
def test_fma32_rounds_once(a, b, c):
    expected = exact_rounding(Fraction(a) * Fraction(b) + Fraction(c))
    assert reference.fma32(np.float32(a), np.float32(b), np.float32(c)) == expected


@settings(max_examples=1000, deadline=None)
@given(st.integers(1, 2**24 - 1), st.integers(1, 2**24 - 1), st.integers(-3, 3), st.integers(-60, 60))
def test_fma32_rounds_once_near_ties(a, b, c, exponent):
    """Products whose float32 rounding is nearly a tie, and an addend far below them decides it."""
    x, y = np.float32(a), np.float32(b)
    z = np.float32(np.ldexp(np.float64(c), exponent))
    expected = exact_rounding(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
    assert reference.fma32(x, y, z) == expected


def test_fma32_decides_a_tie_that_float64_loses():
    # 1 + 2^-24 is a tie in float32; 2^-100 breaks it upwards, yet float64 cannot hold the sum.
    a, b, c = np.float32(1 + 2**-12), np.float32(1 + 2**-12), np.float32(2.0**-100)
    tie = Fraction(float(a)) * Fraction(float(b))
    assert tie == 1 + Fraction(1, 2**11) + Fraction(1, 2**24)
    assert reference.fma32(a, b, c) == np.nextafter(np.float32(1 + 2**-11), np.float32(2))
    assert reference.fma32(a, b, np.float32(0)) == np.float32(1 + 2**-11)


def test_fma32_passes_infinity_and_nan():
    inf = np.float32(np.inf)
    assert reference.fma32(inf, np.float32(1), np.float32(1)) == inf
    assert np.isnan(reference.fma32(inf, np.float32(1), -inf))


def test_quantize_rounds_half_to_even_and_saturates():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9, np.nan, np.inf, -np.inf], np.float32)
    assert reference.quantize_u8(x, 1.0, 10).tolist() == [10, 12, 12, 10, 8, 255, 0, 10, 255, 0]


@given(st.integers(0, 255), st.integers(0, 255), st.floats(2.0**-100, 2.0**100, width=32))
def test_quantize_undoes_dequantize(q, zero_point, scale):
    back = reference.quantize_u8(reference.dequantize(np.uint8(q), scale, zero_point), scale, zero_point)
    assert back == q


@pytest.mark.parametrize(
    ("groups", "stride", "padding", "dilation"),
    [(1, (1, 1), (0, 0, 0, 0), (1, 1)), (2, (2, 1), (1, 0, 2, 1), (1, 2)), (4, (1, 2), (1, 1, 1, 1), (2, 1))],
)
def test_convolution_is_its_definition(groups, stride, padding, dilation):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (2, 4, 7, 8), np.uint8)
    w = rng.integers(-127, 128, (8, 4 // groups, 3, 2), np.int8)
    bias = rng.integers(-1000, 1000, 8, np.int32)
    acc = reference.conv_accumulate(x, 7, w, bias, stride, padding, dilation, groups)
    for _ in range(200):
        b, n, i, j = (int(rng.integers(0, d)) for d in acc.shape)
        expected = int(bias[n])
        for c in range(w.shape[1]):
            for u in range(3):
                for v in range(2):
                    y = i * stride[0] + u * dilation[0] - padding[0]
                    z = j * stride[1] + v * dilation[1] - padding[1]
                    if 0 <= y < 7 and 0 <= z < 8:
                        channel = n // (8 // groups) * (4 // groups) + c
                        expected += (int(x[b, channel, y, z]) - 7) * int(w[n, c, u, v])
        assert acc[b, n, i, j] == expected


def test_a_linear_layer_is_a_convolution_of_one_pixel():
    rng = np.random.default_rng(1)
    x, w = rng.integers(0, 256, (5, 12), np.uint8), rng.integers(-127, 128, (12, 6), np.int8)
    bias, m = rng.integers(-99, 99, 6, np.int32), rng.random(6, np.float32) / 500
    residual = rng.integers(0, 256, (5, 6), np.uint8)
    linear = reference.linear_int8(x, 3, w, bias, m, 100, reference.Residual(residual, 20, 0.7), 100, 200)
    conv = reference.conv_int8(
        x[:, :, None, None], 3, w.T[:, :, None, None], bias, m, 100,
        reference.Residual(residual[:, :, None, None], 20, 0.7), 100, 200,
    )  # fmt: skip
    np.testing.assert_array_equal(linear, conv[:, :, 0, 0])
    assert linear.min() == 100


def test_overflow_is_refused():
    x, w = np.full((1, 70000), 255, np.uint8), np.full((70000, 1), 127, np.int8)
    with pytest.raises(OverflowError):
        reference.linear_accumulate(x, 0, w, np.zeros(1, np.int32))


def test_pools():
    x = np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4)
    assert reference.maxpool_u8(x, (2, 2), (2, 2)).ravel().tolist() == [5, 7, 13, 15]
    assert reference.maxpool_u8(x, (3, 3), (2, 2), (1, 1, 0, 0)).ravel().tolist() == [5, 7, 13, 15]
    assert reference.avgpool_u8(x, 0, 1.0, 0, (2, 2), (2, 2)).ravel().tolist() == [2, 4, 10, 12]  # 2.5, 4.5, ...
    assert reference.avgpool_u8(x, 0, 1.0, 0, (2, 2), (2, 2), (1, 1, 1, 1), False).ravel()[0] == 0
    assert reference.avgpool_u8(x, 0, 1.0, 0, (2, 2), (2, 2), (1, 1, 1, 1), False).ravel()[1] == 2  # 1.5


def test_add():
    a, b = np.array([10, 200], np.uint8), np.array([20, 250], np.uint8)
    assert reference.add_u8(a, 10, 0.5, b, 20, 0.25, 128).tolist() == [128, 255]
