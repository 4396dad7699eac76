"""The boxes that a library is tried on without having them: an empty root, and another CPU under qemu."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pumice.errors import MissingDependencyError
from pumice.targets.detect import host_architecture
from pumice.targets.library import RUNTIME
from pumice.targets.target import Target
from pumice.targets.toolchain import find_toolchain

# Debian's libc6-arm64-cross; qemu itself knows the variable.
SYSROOT = Path(os.environ.get("QEMU_LD_PREFIX", "/usr/aarch64-linux-gnu"))

# Everything that qemu can emulate; what is left out is slow and is asked of no kernel.
NEWEST = "max,sve=off,pauth-impdef=on"

EXAMPLE = Path(__file__).parents[1] / "examples" / "c" / "run.c"
START = Path(__file__).with_name("start.c")

_SYSTEM_LIBRARIES = {"libc", "libm", "libdl", "libpthread", "ld"}


def qemu() -> str:
    """The program that emulates ARM; MissingDependencyError says how to install it."""
    found = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if found is None:
        raise MissingDependencyError(
            "qemu is not installed: `apt-get install qemu-user-static libc6-arm64-cross`, which brings an ARM C library"
        )
    return found


def emulator(cpu: str) -> list[str]:
    """The command before an ARM program's own that runs it on ``cpu``; raises MissingDependencyError."""
    if host_architecture() == "aarch64":
        return [qemu(), "-cpu", cpu]
    if not (SYSROOT / "lib" / "ld-linux-aarch64.so.1").exists():
        raise MissingDependencyError(
            f"no ARM C library in {SYSROOT}: `apt-get install libc6-arm64-cross`, or set QEMU_LD_PREFIX"
        )
    return [qemu(), "-L", str(SYSROOT), "-cpu", cpu]


def build_program(target: Target, source: Path, library: Path, libc: str | None = None, links: bool = True) -> Path:
    """``source`` compiled for ``target`` beside ``library``, and linked with it if it ``links``.

    Raises MissingDependencyError without a compiler for ``target``.
    """
    program = library.with_name(source.stem)
    options = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{RUNTIME}", "-Wl,-rpath,$ORIGIN", "-ldl"]
    command = [*find_toolchain(target, libc).command, "-o", program, source, *([library] if links else []), *options]
    subprocess.run(command, check=True)
    return program


def empty_root(folder: Path, *programs: Path) -> None:
    """Copy ``programs`` (and libraries) into ``folder`` with what they need of libc, and nothing else.

    Raises MissingDependencyError for one that needs anything else.
    """
    for program in programs:
        listed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False).stdout
        for path in re.findall(r"(/\S+) \(0x", listed):
            if re.split(r"[.-]", Path(path).name)[0] not in _SYSTEM_LIBRARIES:
                raise MissingDependencyError(f"'{program.name}' needs {path}, which an empty root does not have")
            inside = folder / path.lstrip("/")
            inside.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, inside)
        shutil.copy(program, folder)


def run_start(command: Sequence[str | Path]) -> dict[str, Any]:
    """What the program of ``start.c`` measured; ``command`` is that or ends in it."""
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        done = subprocess.run(command, stdin=proc, capture_output=True, text=True, check=True)
    finally:
        os.close(proc)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured
