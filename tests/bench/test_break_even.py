import pytest

from bench.break_even import break_even


def test_between_two_shares_it_is_interpolated():
    assert break_even([(0.0, 2.0), (0.5, 1.5), (0.9, 0.5)], 1.0) == pytest.approx(0.7)


def test_the_order_of_the_points_does_not_matter():
    assert break_even([(0.9, 0.5), (0.0, 2.0), (0.5, 1.5)], 1.0) == pytest.approx(0.7)


def test_on_a_measured_point():
    assert break_even([(0.0, 2.0), (0.4, 1.0), (0.9, 0.5)], 1.0) == pytest.approx(0.4)


def test_it_must_stay_below_from_there_on():
    assert break_even([(0.0, 0.9), (0.2, 1.5), (0.4, 0.5)], 1.0) == pytest.approx(0.3)


def test_always_and_never():
    assert break_even([(0.1, 0.9), (0.5, 0.5)], 1.0) == 0.1
    assert break_even([(0.1, 0.9), (0.5, 0.5)], 0.4) is None
    assert break_even([], 1.0) is None
