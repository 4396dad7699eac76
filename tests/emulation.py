"""Programs for ARM: under qemu, or as they are on a machine that is one; skipped where they cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import boxes
from bench.boxes import NEWEST
from pumice.errors import MissingDependencyError
from pumice.targets.target import Target
from pumice.targets.toolchain import find_toolchain

__all__ = ["NEWEST", "build_program", "emulator", "missing"]


def missing() -> str | None:
    """Why programs for ARM cannot be built and run here, and what to install."""
    try:
        boxes.emulator("max")
        find_toolchain(Target.parse("armv8-a"))
    except MissingDependencyError as error:
        return str(error)
    return None


def emulator(cpu: str) -> list[str]:
    """The command before a program's own that runs it on ``cpu``; skips the test where there is none."""
    if reason := missing():
        pytest.skip(reason)
    return boxes.emulator(cpu)


def build_program(target: Target, source: Path, library: Path, libc: str | None = None, links: bool = True) -> Path:
    """``source`` compiled beside ``library``, and linked with it; skips the test without a compiler for ``target``."""
    try:
        return boxes.build_program(target, source, library, libc, links)
    except MissingDependencyError as error:
        pytest.skip(str(error))
