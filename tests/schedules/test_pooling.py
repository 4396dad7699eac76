"""Windows and means over packed maps, against the definition."""

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
from reference import avgpool_u8, maxpool_u8

from pumice.schedules.geometry import Geometry, Window
from pumice.schedules.places import tap_offsets
from pumice.schedules.pooling import GlobalAverage, Pooling, global_average, pooling
from pumice.targets.isa import isa


def pool(isa_name, x, window, kind, after, fill, **numbers):
    """The pooling kernel on NCHW ``x``; also what lies in the padding of its result."""
    out = output_size(x.shape[2:], window, after)
    target = geometry_for(x.shape, (x.shape[0], 1, *out), window)
    source = phases_of(x, target, window, fill)
    rows = len(source) // len(window.phases())
    taps = tuple(int(offset) for offset in tap_offsets(window, target, target))
    dtype = "uint8" if x.dtype == np.uint8 else "float32"
    work = Pooling(kind, dtype, rows, len(window.phases()), target, target, taps, **numbers)
    mask = [np.where(is_padding(target), 0, -1).astype(np.int32)] if target.is_padded else []
    y = garbage((rows, target.positions, work.depth), dtype)
    y = run_kernel(pooling(work, isa(isa_name)), isa_name, source, *mask, y)
    return unpacked(y, target, x.shape[1]), y[:, is_padding(target)] if target.is_padded else y[:0]


cases = {
    "isa_name": st.sampled_from(RUNNABLE),
    "seed": st.integers(0, 10**6),
    "batch": st.integers(1, 2),
    "channels": st.integers(1, 6),
    "size": st.tuples(st.integers(1, 9), st.integers(2, 21)),
    "kernel": st.sampled_from([(2, 2), (3, 3), (1, 2), (3, 1)]),
    "stride": st.sampled_from([(1, 1), (2, 2), (3, 2)]),
    "after": st.tuples(st.integers(0, 2), st.integers(0, 2)),
}


def window_and_data(seed, batch, channels, size, kernel, stride, after, dtype):
    window = Window(kernel, stride, (1, 1), (kernel[0] // 2, kernel[1] // 2))
    after = tuple(min(a, k - 1) for a, k in zip(after, kernel, strict=True))
    out = output_size(size, window, after)
    assume(min(out) > 0 and out != (1, 1))
    rng = np.random.default_rng(seed)
    shape = (batch, channels, *size)
    x = rng.integers(0, 256, shape) if dtype == np.uint8 else rng.standard_normal(shape)
    return window, after, x.astype(dtype)


@settings(max_examples=25)
@given(**cases, zero_point=st.sampled_from([0, 8, 255]))
def test_maximum_of_bytes(isa_name, seed, batch, channels, size, kernel, stride, after, zero_point):
    """Bytes compare unsigned; padding never wins, not even over a zero point of 255."""
    window, after, x = window_and_data(seed, batch, channels, size, kernel, stride, after, np.uint8)
    numbers = {"zero_point": zero_point, "output_zero_point": zero_point}
    got, margin = pool(isa_name, x, window, "maximum", after, 0, **numbers)
    np.testing.assert_array_equal(got, maxpool_u8(x, kernel, stride, (*window.padding, *after)))
    assert (margin == zero_point).all()


@settings(max_examples=25)
@given(**cases, zero_points=st.sampled_from([(0, 0), (8, 200), (255, 3)]))
def test_average_of_bytes(isa_name, seed, batch, channels, size, kernel, stride, after, zero_points):
    window, after, x = window_and_data(seed, batch, channels, size, kernel, stride, after, np.uint8)
    zx, zy = zero_points
    m = float(np.float32(np.float64(0.7) / (kernel[0] * kernel[1])))
    numbers = {"zero_point": zx, "multiplier": m, "output_zero_point": zy}
    got, margin = pool(isa_name, x, window, "average", after, zx, **numbers)
    np.testing.assert_array_equal(got, avgpool_u8(x, zx, 0.7, zy, kernel, stride, (*window.padding, *after)))
    assert (margin == zy).all()


@settings(max_examples=20)
@given(**cases, kind=st.sampled_from(["maximum", "average"]))
def test_float(isa_name, seed, batch, channels, size, kernel, stride, after, kind):
    window, after, x = window_and_data(seed, batch, channels, size, kernel, stride, after, np.float32)
    fill = 0.0 if kind == "average" else float(np.finfo(np.float32).min)
    got, margin = pool(isa_name, x, window, kind, after, fill, multiplier=1 / (kernel[0] * kernel[1]))
    around = np.pad(x, ((0, 0), (0, 0), *zip(window.padding, after, strict=True)), constant_values=fill)
    views = np.lib.stride_tricks.sliding_window_view(around, kernel, axis=(2, 3))[:, :, :: stride[0], :: stride[1]]
    if kind == "maximum":
        np.testing.assert_array_equal(got, views.max(axis=(4, 5)))
    else:
        np.testing.assert_allclose(got, views.astype(np.float64).mean(axis=(4, 5)), rtol=1e-5, atol=1e-6)
    assert (margin == 0).all()


@pytest.mark.parametrize("isa_name", ALL_ISAS)
@pytest.mark.parametrize(("batch", "channels", "height", "width"), [(1, 9, 7, 7), (3, 4, 5, 21), (2, 5, 1, 3)])
def test_mean_of_whole_maps(isa_name, batch, channels, height, width):
    rng = np.random.default_rng(4)
    x = rng.integers(0, 256, (batch, channels, height, width)).astype(np.uint8)
    source, target = Geometry(batch, height, width, 1, 2), Geometry(batch, 1, 1)
    m = float(np.float32(np.float64(0.6) / (height * width)))
    work = GlobalAverage("uint8", -(-channels // 4), source, target, 77, m, 12)
    y = garbage((work.rows, target.positions, 4), "uint8")
    y = run_kernel(global_average(work, isa(isa_name)), isa_name, packed_of(x, source, 77), y)
    want = avgpool_u8(x, 77, 0.6, 12, (height, width))
    np.testing.assert_array_equal(unpacked(y, target, channels), want)


@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_mean_of_whole_float_maps(isa_name):
    x = np.random.default_rng(5).standard_normal((2, 5, 6, 9)).astype(np.float32)
    source, target = Geometry(2, 6, 9, 1, 1), Geometry(2, 1, 1, 1, 1)
    work = GlobalAverage("float32", 8, source, target, 0, 1 / 54)
    y = garbage((8, target.positions, 1), "float32")
    y = run_kernel(global_average(work, isa(isa_name)), isa_name, packed_of(x, source, 0.0), y)
    want = x.astype(np.float64).mean(axis=(2, 3), keepdims=True)
    np.testing.assert_allclose(unpacked(y, target, 5), want, rtol=1e-5, atol=1e-6)
    assert (y[:, is_padding(target)] == 0).all()
