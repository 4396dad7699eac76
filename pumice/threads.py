"""How many threads a compiled model runs on: what this process may use, and no more."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path

from pumice.errors import UsageError

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def check_threads(threads: int | None) -> int:
    """How many threads to use: ``threads``, no more than there are CPUs; None means one for each physical core.

    Raises UsageError for a number below one, and for what is no whole number.
    """
    if threads is None:
        return default_threads()
    if not isinstance(threads, int):
        raise UsageError(f"the thread count is {threads!r}: give a whole number, or leave it out for one a core")
    if threads < 1:
        raise UsageError(f"the thread count is {threads}: give 1 or more, or leave it out for one a core")
    available = len(allowed_cpus())
    if threads > available:
        warnings.warn(
            f"{threads} threads asked for, {available} used: this process may run on no more CPUs", stacklevel=3
        )
    return min(threads, available)


def allowed_cpus() -> tuple[int, ...]:
    """The logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def default_threads() -> int:
    """One for each physical core that this process may use, within its container's CPU quota."""
    siblings = set()
    for cpu in allowed_cpus():
        listed = Path(_TOPOLOGY.format(cpu))
        siblings.add(listed.read_text().strip() if listed.exists() else str(cpu))
    return min(len(siblings), _quota(_CGROUP_QUOTA.read_text() if _CGROUP_QUOTA.exists() else "max"))


def _quota(cpu_max: str) -> int:
    """Whole CPUs of a cgroup's ``cpu.max``: ``150000 100000`` is 2."""
    quota, _, period = cpu_max.strip().partition(" ")
    if quota == "max" or not quota.isdigit():
        return 1 << 20
    return max(1, math.ceil(int(quota) / int(period or 100_000)))
