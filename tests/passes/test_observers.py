import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pumice.errors import ModelError
from pumice.passes.observers import (
    OBSERVERS,
    EntropyObserver,
    Histogram,
    MeanSquaredErrorObserver,
    MinMaxObserver,
    PercentileObserver,
    affine_uint8,
)

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def watched(kind, *arrays):
    observer = kind("tensor")
    for array in arrays:
        observer.observe(np.asarray(array, np.float32))
    return observer


def rounding_error(values, lo, hi):
    scale, zero_point = affine_uint8(lo, hi)
    q = np.clip(np.rint(values / scale) + zero_point, 0, 255)
    return np.mean(np.square((q - zero_point) * scale - values))


@given(FINITE, FINITE)
def test_zero_is_exact_and_the_range_is_covered(a, b):
    lo, hi = min(a, b), max(a, b)
    scale, zero_point = affine_uint8(lo, hi)
    assert scale > 0 and np.isfinite(scale) and scale == float(np.float32(scale))
    assert 0 <= zero_point <= 255
    assert (255 - zero_point) * scale >= hi - 0.6 * scale and -zero_point * scale <= lo + 0.6 * scale


@pytest.mark.parametrize(
    ("lo", "hi", "expected"),
    [
        (0, 0, (1.0, 0)),  # all zero
        (3, 3, (float(np.float32(3 / 255)), 0)),  # constant
        (-3, -3, (float(np.float32(3 / 255)), 255)),
        (0, 1e-45, (2.0**-100, 0)),  # denormal
        (-1, 1, (float(np.float32(2 / 255)), 127)),
        (0, 1e30, (float(np.float32(1e30 / 255)), 0)),
    ],
)
def test_degenerate_ranges(lo, hi, expected):
    assert affine_uint8(lo, hi) == expected


@pytest.mark.parametrize("kind", OBSERVERS.values())
class TestEveryObserver:
    def test_nothing_seen(self, kind):
        assert affine_uint8(*watched(kind).range()) == (1.0, 0)
        assert affine_uint8(*watched(kind, np.zeros((0, 3))).range()) == (1.0, 0)

    @pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1e-40, 1e30, -3e38])
    def test_a_constant_is_covered(self, kind, value):
        lo, hi = watched(kind, np.full(1000, value)).range()
        scale, zero_point = affine_uint8(lo, hi)
        value = float(np.float32(value))
        q = np.clip(np.rint(value / scale) + zero_point, 0, 255)
        # A histogram knows a value to a bin, a 2047th of the range.
        assert abs((q - zero_point) * scale - value) <= max(0.01 * abs(value), 2.0**-100)

    def test_stays_within_what_was_seen(self, kind):
        values = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
        lo, hi = watched(kind, values).range()
        assert values.min() <= lo < 0 < hi <= values.max()

    def test_the_order_of_samples_does_not_matter(self, kind):
        rng = np.random.default_rng(1)
        samples = [rng.standard_normal(100) * 10.0**k for k in (0, 3, -3, 1)]
        assert watched(kind, *samples).range() == watched(kind, *samples[::-1]).range()
        assert watched(kind, *samples).range() == watched(kind, np.concatenate(samples)).range()

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_is_refused_by_name(self, kind, bad):
        with pytest.raises(ModelError, match="'tensor' is not finite"):
            watched(kind, [1.0, bad])

    def test_a_huge_outlier_is_survived(self, kind):
        lo, hi = watched(kind, np.linspace(0, 1, 100_000), [1e30]).range()
        assert lo == 0 and np.isfinite(hi) and hi > 0.9


def test_minmax():
    assert watched(MinMaxObserver, [1, 2], [-3]).range() == (-3, 2)


def test_percentile_ignores_one_outlier_in_ten_thousand():
    lo, hi = watched(PercentileObserver, np.linspace(0, 1, 100_000), [1e30]).range()
    assert lo == 0
    assert hi == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize(("mean", "deviation"), [(0, 1), (5, 1), (-3, 2)])
def test_percentile_of_a_normal_distribution(mean, deviation):
    values = np.random.default_rng(2).normal(mean, deviation, 200_000).astype(np.float32)
    lo, hi = watched(PercentileObserver, values).range()
    if hi > 0:
        assert hi == pytest.approx(np.quantile(values, 0.9999), rel=0.02)
    if lo < 0:
        assert lo == pytest.approx(np.quantile(values, 0.0001), rel=0.02)


@settings(deadline=None)
@given(st.lists(st.lists(FINITE, min_size=1, max_size=20), min_size=1, max_size=6))
def test_a_histogram_grows_to_what_it_would_have_been(samples):
    """Streaming, in pieces and reversed, gives the same counts as all at once, and none is lost."""
    streamed, reversed_, batch = Histogram(), Histogram(), Histogram()
    for sample in samples:
        streamed.add(np.array(sample, np.float32))
    for sample in samples[::-1]:
        reversed_.add(np.array(sample, np.float32))
    everything = np.concatenate([np.array(sample, np.float32) for sample in samples])
    batch.add(everything)
    for other in (reversed_, batch):
        assert (streamed.width, streamed.first) == (other.width, other.first)
        np.testing.assert_array_equal(streamed.counts, other.counts)
    assert streamed.counts.sum() == everything.size == streamed.magnitudes().sum()
    assert streamed.counts.size <= 4096


def test_magnitudes_fold_the_negative_bins():
    histogram = Histogram()
    histogram.add(np.array([-3.5, -0.5, 0.5, 1.5, 1.5, 2040.0], np.float32))
    assert histogram.width == 1
    assert histogram.magnitudes()[:5].tolist() == [2, 2, 0, 1, 0]


def test_mean_squared_error_finds_the_best_clip():
    """No grid of clip ranges does noticeably better, and clipping pays for a long tail."""
    values = np.random.default_rng(3).laplace(0, 1, 50_000).astype(np.float32)
    lo, hi = watched(MeanSquaredErrorObserver, values).range()
    found = rounding_error(values, lo, hi)
    ends = np.linspace(0.2, 1, 40)
    best = min(rounding_error(values, values.min() * a, values.max() * b) for a in ends for b in ends)
    assert found <= best * 1.05
    assert found < 0.95 * rounding_error(values, values.min(), values.max())


def test_entropy_clips_a_long_tail_and_keeps_a_uniform_range():
    rng = np.random.default_rng(4)
    body = np.abs(rng.normal(0, 1, 100_000)).astype(np.float32)
    _, hi = watched(EntropyObserver, body, np.full(5, 100)).range()
    assert 3 < hi < 40
    _, hi = watched(EntropyObserver, rng.uniform(0, 1, 100_000)).range()
    assert hi > 0.95


def test_entropy_is_not_drawn_to_the_zeros_of_a_relu():
    values = np.maximum(np.random.default_rng(5).normal(0, 1, 100_000), 0).astype(np.float32)
    assert watched(EntropyObserver, values).range()[1] > 2.5
