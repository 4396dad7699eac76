"""Where positions lie, and that a tap is one shift: checked against windows of a padded numpy array."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernels import geometry_for, is_padding, output_size, packed_of, phases_of, positions_of

from pumice.schedules.geometry import LANES, Geometry, Window
from pumice.schedules.places import tap_offsets

small = st.integers(1, 3)
geometries = st.builds(
    Geometry, st.integers(1, 3), st.integers(1, 9), st.integers(1, 20), st.integers(0, 3), st.integers(0, 3)
)


@settings(max_examples=200)
@given(geometries)
def test_pixels_lie_apart_and_padding_is_shared(geometry):
    places = positions_of(geometry)
    assert len(set(places.tolist())) == geometry.pixels == len(places)
    assert (geometry.pixel_positions.ravel() == places).all()
    assert places[0] == geometry.base and places[-1] == geometry.base + geometry.span - 1
    assert ((geometry.mask == 0) == is_padding(geometry)).all()
    assert geometry.mask.dtype == np.int32 and set(np.unique(geometry.mask)) <= {0, -1}


@settings(max_examples=200)
@given(geometries)
def test_planes_are_cut_in_whole_vectors(geometry):
    assert geometry.base % LANES == 0
    assert geometry.positions % LANES == 0 or geometry.positions == geometry.pixels == 1
    before, after = geometry.base, geometry.positions - geometry.base - geometry.span
    room = geometry.pad_h * geometry.pitch + geometry.pad_w
    assert before >= room and after >= room
    assert geometry.is_padded == (geometry.pad_h + geometry.pad_w > 0)


@settings(max_examples=200)
@given(geometries)
def test_every_pixel_has_its_padding_around_it(geometry):
    """Within the padding of a pixel at the border no other pixel lies outside the image."""
    hits = set(positions_of(geometry).tolist())
    for h in range(-geometry.pad_h, geometry.height + geometry.pad_h):
        for w in range(-geometry.pad_w, geometry.width + geometry.pad_w):
            inside = 0 <= h < geometry.height and 0 <= w < geometry.width
            for n in range(geometry.batch):
                place = geometry.base + n * geometry.image + h * geometry.pitch + w
                assert 0 <= place < geometry.positions
                assert (place in hits) == inside


def test_single_pixels_of_a_batch_lie_like_tokens():
    assert Geometry(5, 1, 1).normalized() == Geometry.of_tokens(5)
    assert Geometry(5, 1, 1).positions == Geometry.of_tokens(5).positions
    assert Geometry(5, 1, 1, 1, 1).normalized() == Geometry(5, 1, 1, 1, 1)
    assert Geometry.of_tokens(1).positions == 1


def axis_window():
    return st.tuples(small, small, small, st.integers(0, 3))


@settings(max_examples=300)
@given(
    axis_window(),
    axis_window(),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 2),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_reading_through_offsets_is_reading_a_padded_window(along_h, along_w, size, batch, after):
    """For every window, also with other padding behind than in front and outputs narrower than the input."""
    kernel, stride, dilation, padding = zip(along_h, along_w, strict=True)
    window = Window(kernel, stride, dilation, padding)
    height, width = output_size(size, window, after)
    assume(height > 0 and width > 0)
    x = np.arange(1, 1 + batch * size[0] * size[1], dtype=np.float32).reshape(batch, 1, *size)
    target = geometry_for(x.shape, (batch, 1, height, width), window)
    plane = phases_of(x, target, window, 0.0)[: len(window.phases())].reshape(-1)
    read = tap_offsets(window, target, target)[:, None] + positions_of(target)[None, :]
    assert read.min() >= 0 and read.max() < plane.size
    around = np.pad(x, ((0, 0), (0, 0), *((p, 40) for p in padding)))
    taps = [
        around[
            :,
            0,
            kh * dilation[0] : kh * dilation[0] + stride[0] * (height - 1) + 1 : stride[0],
            kw * dilation[1] : kw * dilation[1] + stride[1] * (width - 1) + 1 : stride[1],
        ]
        for kh in range(kernel[0])
        for kw in range(kernel[1])
    ]
    np.testing.assert_array_equal(plane[read], np.stack(taps).reshape(len(taps), -1))


def test_taps_run_row_by_row():
    window = Window((2, 3), stride=(2, 1), padding=(1, 0))
    assert window.taps()[0] == ((1, 0), (-1, 0))
    assert window.taps()[1] == ((1, 0), (-1, 1))
    assert window.taps()[3] == ((0, 0), (0, 0))
    assert window.phases() == [(0, 0), (1, 0)]


@pytest.mark.parametrize("batch", [1, 3])
def test_packing_helpers_are_inverse(batch):
    geometry = Geometry(batch, 2, 5, 1, 2)
    x = np.arange(batch * 6 * 10, dtype=np.uint8).reshape(batch, 6, 2, 5)
    packed = packed_of(x, geometry, 7)
    assert packed.shape == (2, geometry.positions, 4)
    assert (packed[:, is_padding(geometry)] == 7).all()
    assert packed[1, positions_of(geometry)[0], 1] == x[0, 5, 0, 0]
