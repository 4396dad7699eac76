"""How many threads a compiled model runs on, and where: TVM's thread pool, told about this process's limits.

Left to itself TVM's pool takes half the logical cores of the machine, pins each worker to one of them whatever
``taskset`` or the container says, and never grows. A pool belongs to the Python thread that first used it, so
each thread of a program is configured when it first runs a model.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from functools import cache
from pathlib import Path

import tvm

from pumice.errors import UsageError

_SHARE_ALL_CORES = -3  # TVM's ThreadGroup::kSpecifyThreadShareAllCore: the scheduler places the workers
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_configured = threading.local()


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


@cache
def allowed_cpus() -> tuple[int, ...]:
    """The logical CPUs that this process may run on; asked once, because TVM's pool narrows the thread's own."""
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


def use_threads(threads: int) -> None:
    """Make what this Python thread runs next use ``threads`` threads (from ``check_threads``)."""
    if getattr(_configured, "threads", None) == threads:
        return
    cpus = [str(cpu) for cpu in allowed_cpus()]
    tvm.get_global_func("runtime.config_threadpool")(_SHARE_ALL_CORES, threads, cpus)
    used = int(tvm.get_global_func("runtime.NumThreads")())
    if used < threads:  # other TVM code made this thread's pool before, and pools do not grow
        warnings.warn(
            f"{threads} threads asked for, {used} used: TVM made this thread's pool earlier; load the model before "
            "running other TVM code, or set TVM_NUM_THREADS",
            stacklevel=3,
        )
    _configured.threads = threads


def _quota(cpu_max: str) -> int:
    """Whole CPUs of a cgroup's ``cpu.max``: ``150000 100000`` is 2."""
    quota, _, period = cpu_max.strip().partition(" ")
    if quota == "max" or not quota.isdigit():
        return 1 << 20
    return max(1, math.ceil(int(quota) / int(period or 100_000)))
