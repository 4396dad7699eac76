import warnings

import pytest

from pumice import threads
from pumice.errors import UsageError
from pumice.threads import allowed_cpus, check_threads, default_threads


@pytest.mark.parametrize("count", [0, -1, 1.5, "2"])
def test_no_threads_are_refused(count):
    with pytest.raises(UsageError, match=str(count)):
        check_threads(count)


def test_more_than_there_are_is_capped_with_a_warning():
    with pytest.warns(UserWarning, match="used"):
        assert check_threads(10_000) == len(allowed_cpus())


def test_what_fits_is_taken_silently():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_threads(1) == 1
        assert check_threads(None) == default_threads()


@pytest.mark.parametrize(
    ("text", "cpus"), [("max 100000", 1 << 20), ("200000 100000", 2), ("150000 100000\n", 2), ("10000 100000", 1)]
)
def test_a_containers_quota_counts(text, cpus):
    assert threads._quota(text) == cpus


def test_the_default_stays_within_the_quota(monkeypatch, tmp_path):
    quota = tmp_path / "cpu.max"
    quota.write_text("100000 100000")
    monkeypatch.setattr(threads, "_CGROUP_QUOTA", quota)
    assert default_threads() == 1
