"""Into the packed form, out of it, and from one plane to another."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernels import (
    ALL_ISAS,
    RUNNABLE,
    garbage,
    geometry_for,
    is_padding,
    output_size,
    packed_of,
    phases_of,
    run_kernel,
    unpacked,
)
from reference import dequantize, quantize_u8

from pumice.schedules.geometry import Geometry, Window
from pumice.schedules.layout import Packing, Planes, pack, planes, quantize_packed, unpack
from pumice.targets.isa import isa

SCALE = 0.1  # not a power of two: dividing by it is not multiplying by its inverse


def numbers(rng, shape):
    """float32 with ties, values beyond the range, infinities and NaN."""
    ties = (rng.integers(-300, 300, shape) + 0.5).astype(np.float32) * np.float32(SCALE)
    x = np.where(rng.random(shape) < 0.5, ties, rng.standard_normal(shape) * 12).astype(np.float32)
    for value in (np.nan, np.inf, -np.inf, 1e30, -0.0):
        x.flat[rng.integers(0, x.size)] = value
    return x


def packing(channels, geometry, tokens, quantized, zero_point, threads=1):
    return Packing(channels, geometry, tokens, SCALE if quantized else None, zero_point, threads)


def run_pack(isa_name, work, x):
    dtype = "float32" if work.scale is None else "uint8"
    return run_kernel(pack(work, isa(isa_name)), isa_name, x.ravel(), garbage(work.packed_shape, dtype))


geometries = st.builds(
    Geometry, st.integers(1, 2), st.integers(1, 4), st.integers(1, 19), st.integers(0, 2), st.integers(0, 2)
)


@settings(max_examples=30)
@given(
    st.sampled_from(RUNNABLE), st.integers(0, 10**6), st.integers(1, 10), geometries, st.booleans(),
    st.sampled_from([0, 100, 255]),
)  # fmt: skip
def test_maps_are_quantized_and_packed(isa_name, seed, channels, geometry, quantized, zero_point):
    x = numbers(np.random.default_rng(seed), (geometry.batch, channels, geometry.height, geometry.width))
    y = run_pack(isa_name, packing(channels, geometry, False, quantized, zero_point), x)
    want = quantize_u8(x, SCALE, zero_point) if quantized else x
    np.testing.assert_array_equal(unpacked(y, geometry, channels), want)
    if geometry.is_padded:
        assert (y[:, is_padding(geometry)] == (zero_point if quantized else 0)).all()


@settings(max_examples=30)
@given(
    st.sampled_from(RUNNABLE), st.integers(0, 10**6), st.integers(1, 34), st.integers(1, 35), st.booleans(),
    st.sampled_from([0, 100, 255]),
)  # fmt: skip
def test_tokens_are_quantized_and_packed(isa_name, seed, tokens, channels, quantized, zero_point):
    x = numbers(np.random.default_rng(seed), (tokens, channels))
    geometry = Geometry.of_tokens(tokens)
    y = run_pack(isa_name, packing(channels, geometry, True, quantized, zero_point), x)
    want = quantize_u8(x, SCALE, zero_point) if quantized else x
    np.testing.assert_array_equal(unpacked(y, geometry, channels)[0, :, 0].T, want)


@settings(max_examples=30)
@given(
    st.sampled_from(RUNNABLE), st.integers(0, 10**6), st.integers(1, 10), geometries, st.booleans(), st.booleans(),
    st.sampled_from([0, 100, 255]),
)  # fmt: skip
def test_unpacking_gives_the_numbers_back(isa_name, seed, channels, geometry, tokens, quantized, zero_point):
    rng = np.random.default_rng(seed)
    shape = (geometry.batch, channels, geometry.height, geometry.width)
    stored = rng.integers(0, 256, shape).astype(np.uint8) if quantized else rng.random(shape).astype(np.float32)
    work = packing(channels, geometry, tokens, quantized, zero_point)
    x = packed_of(stored, geometry, 77)
    y = run_kernel(unpack(work, isa(isa_name)), isa_name, x, garbage((work.size,), "float32"))
    want = dequantize(stored, SCALE, zero_point) if quantized else stored
    want = want.transpose(0, 2, 3, 1) if tokens else want
    np.testing.assert_array_equal(y, want.ravel())
    if quantized:
        back = quantize_u8(y.reshape(want.shape), SCALE, zero_point)
        np.testing.assert_array_equal(back.transpose(0, 3, 1, 2) if tokens else back, stored)


@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_packed_float_is_quantized_in_place(isa_name):
    geometry = Geometry(2, 3, 7, 1, 1)
    x = numbers(np.random.default_rng(2), (2, 6, 3, 7))
    work = packing(6, geometry, False, True, 33)
    floats = packed_of(x, geometry, 0.0)
    y = run_kernel(quantize_packed(work, isa(isa_name)), isa_name, floats, garbage(work.packed_shape, "uint8"))
    np.testing.assert_array_equal(unpacked(y, geometry, 6), quantize_u8(x, SCALE, 33))
    assert (y[:, is_padding(geometry)] == 33).all()


@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_nan_becomes_the_zero_point(isa_name):
    x = np.full((1, 8, 2, 17), np.nan, np.float32)
    y = run_pack(isa_name, packing(8, Geometry(1, 2, 17), False, True, 42), x)
    assert (unpacked(y, Geometry(1, 2, 17), 8) == 42).all()


def test_threads_change_nothing():
    x = numbers(np.random.default_rng(6), (1, 64, 40, 41))
    geometry = Geometry(1, 40, 41, 1, 1)
    one, two = (run_pack(RUNNABLE[0], packing(64, geometry, False, True, 9, n), x) for n in (1, 2))
    np.testing.assert_array_equal(one, two)


@settings(max_examples=40)
@given(
    isa_name=st.sampled_from(RUNNABLE),
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 2),
    channels=st.integers(1, 6),
    size=st.tuples(st.integers(1, 9), st.integers(1, 19)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.sampled_from([(1, 1), (2, 2), (3, 2)]),
    dilation=st.sampled_from([(1, 1), (2, 1)]),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    wider=st.integers(0, 2),
    dtype=st.sampled_from(["uint8", "float32"]),
)
def test_planes_hold_the_phases_of_a_window(
    isa_name, seed, batch, channels, size, kernel, stride, dilation, padding, wider, dtype
):
    """Whatever padding the source has; what no pixel fills holds the fill."""
    window = Window(kernel, stride, dilation, padding)
    out = output_size(size, window)
    assume(min(out) > 0)
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (batch, channels, *size)).astype(dtype)
    reach = geometry_for(x.shape, (batch, 1, *out), window)
    target = Geometry(batch, *out, reach.pad_h, reach.pad_w + wider)
    source = Geometry(batch, *size, wider, 1)
    fill = 201.0
    channels_stored = -(-channels // 4) * 4
    x = np.concatenate([x, np.zeros((batch, channels_stored - channels, *size), dtype)], axis=1)
    rows = channels_stored // 4 if dtype == "uint8" else channels_stored
    work = Planes(rows, source, target, window, dtype, fill)
    shape = (rows * len(window.phases()), target.positions, work.depth)
    y = run_kernel(planes(work, isa(isa_name)), isa_name, packed_of(x, source, 55), garbage(shape, dtype))
    np.testing.assert_array_equal(y, phases_of(x, target, window, fill))
