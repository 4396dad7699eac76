"""On what a benchmark ran: kept in its JSON, so that numbers of two machines are not taken for each other's."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pumice.targets.target import Target
from pumice.threads import allowed_cpus

_PACKAGES = ("pumice", "apache-tvm", "onnxruntime", "openvino")


def environment() -> dict[str, Any]:
    """CPU, number of CPUs that this process may use, instruction set, versions of the engines."""
    return {
        "cpu": _cpu(),
        "cpus": len(allowed_cpus()),
        "isa": Target.parse("native").isa,
        "versions": {package: _version(package) for package in _PACKAGES},
    }


def _cpu() -> str:
    listed = Path("/proc/cpuinfo")
    names = (
        [line for line in listed.read_text().splitlines() if line.startswith("model name")] if listed.exists() else []
    )
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
