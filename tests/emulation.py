"""Programs for ARM: under qemu, or as they are on a machine that is one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pumice.errors import MissingDependencyError
from pumice.targets.detect import host_architecture
from pumice.targets.library import RUNTIME
from pumice.targets.target import Target
from pumice.targets.toolchain import find_toolchain

# Debian's libc6-arm64-cross; qemu itself knows the variable.
SYSROOT = Path(os.environ.get("QEMU_LD_PREFIX", "/usr/aarch64-linux-gnu"))

# Everything that qemu can emulate; what is left out is slow and is asked of no kernel.
NEWEST = "max,sve=off,pauth-impdef=on"


def missing() -> str | None:
    """Why programs for ARM cannot be built and run here, and what to install."""
    if _qemu() is None:
        return "qemu is not installed: `apt-get install qemu-user-static libc6-arm64-cross`"
    if host_architecture() != "aarch64" and not (SYSROOT / "lib" / "ld-linux-aarch64.so.1").exists():
        return f"no ARM C library in {SYSROOT}: `apt-get install libc6-arm64-cross`, or set QEMU_LD_PREFIX"
    try:
        find_toolchain(Target.parse("armv8-a"))
    except MissingDependencyError as error:
        return str(error)
    return None


def emulator(cpu: str) -> list[str]:
    """The command before a program's own that runs it on ``cpu``; skips the test where there is none."""
    if reason := missing():
        pytest.skip(reason)
    prefix = [] if host_architecture() == "aarch64" else ["-L", str(SYSROOT)]
    return [str(_qemu()), *prefix, "-cpu", cpu]


def _qemu() -> str | None:
    return shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


def build_program(target: Target, source: Path, library: Path, libc: str | None = None, links: bool = True) -> Path:
    """``source`` compiled beside ``library``, and linked with it; skips the test without a compiler for ``target``."""
    try:
        compiler = find_toolchain(target, libc).command
    except MissingDependencyError as error:
        pytest.skip(str(error))
    program = library.with_name(source.stem)
    options = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{RUNTIME}", "-Wl,-rpath,$ORIGIN", "-ldl"]
    subprocess.run([*compiler, "-o", program, source, *([library] if links else []), *options], check=True)
    return program
