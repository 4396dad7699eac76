import numpy as np
import pytest

from pumice import bench
from pumice.bench import measure


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the engines and sleep advance."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(bench, "time", clock)
    return clock


def engine(clock, milliseconds, calls=None):
    times = iter(milliseconds)

    def call():
        if calls is not None:
            calls.append(clock.now)
        clock.now += next(times) / 1000

    return call


def test_medians_spread_and_ratio(clock):
    slow = np.tile([4.0, 5.0, 6.0], 100_000)
    timings = measure({"a": engine(clock, np.full(300_000, 2.0)), "b": engine(clock, slow)}, 2.0)
    a, b = timings
    assert (a.name, a.median, a.p10, a.p90, a.ratio) == ("a", *(pytest.approx(2.0),) * 3, 1.0)
    assert b.median == pytest.approx(5.0)
    assert b.p10 == pytest.approx(4.0)
    assert b.p90 == pytest.approx(6.0)
    assert b.ratio == pytest.approx(2.5, rel=0.1)
    assert a.calls > b.calls > 50
    assert a.to_json()["median_ms"] == a.median


def test_a_disturbance_of_the_machine_hits_both(clock):
    def throttled(cost):
        def call():
            clock.now += cost * (3 if clock.now > 1.5 else 1) / 1000

        return call

    _, b = measure({"a": throttled(2.0), "b": throttled(6.0)}, 3.0)
    assert b.ratio == pytest.approx(3.0, rel=0.01)


def test_slow_engines_get_five_rounds(clock):
    (timing,) = measure({"a": engine(clock, np.full(100, 5000.0))}, 1.0)
    assert timing.calls >= 5
