"""The C compilers that assemble and link a library for a target, and how they are found.

For this machine that is the system's own; for another the system's cross compiler, or the one in the wheel
``ziglang``, which brings every C library along and so links for a chosen version of glibc, or for musl.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pumice.errors import MissingDependencyError, UsageError
from pumice.targets.detect import host_architecture
from pumice.targets.target import Target

MUSL = "musl"

# What zig links against when nobody says: Debian 10, RHEL 8, Ubuntu 18.10 and everything younger has it.
DEFAULT_GLIBC = "glibc-2.28"

_OLDEST_GLIBC = (2, 17)  # the first for aarch64
_GLIBC = re.compile(r"glibc-(\d+)\.(\d+)")

# Atomic operations in line: the calls that GCC and Clang make of them look at the CPU when the library is loaded.
_OPTIONS: dict[str, tuple[str, ...]] = {"x86_64": (), "aarch64": ("-mno-outline-atomics",)}

# Zig does by itself, and not every system's compiler: code for the oldest CPU, and read-only data apart from the code.
_BASELINE = {"x86_64": "-march=x86-64", "aarch64": "-march=armv8-a"}
_SEPARATE = "-Wl,-z,separate-code"


@dataclass(frozen=True)
class Toolchain:
    """A C compiler with what makes it build for one target: ``command`` and then a compiler's usual arguments."""

    command: tuple[str, ...]

    def link(self, output: str, inputs: Sequence[str], folder: Path, options: Sequence[str] = ()) -> None:
        """Compile, assemble and link ``inputs`` into the shared library ``output``; all are names in ``folder``.

        The same inputs give the same bytes: no path, date or identifier of the build reaches the library. Raises
        MissingDependencyError where the compiler fails.
        """
        # The table of local symbols is a tenth of a small library, and nothing reads it.
        arguments = ["-shared", "-fPIC", "-O2", "-static-libgcc", "-Wl,-s", "-Wl,--build-id=none"]
        command = [*self.command, *arguments, *options, "-o", output, *inputs, "-lm", "-pthread"]
        # zig knows nothing of the files that an assembler file includes: its cache would give old ones for new.
        environment = os.environ | {"ZIG_LOCAL_CACHE_DIR": str(Path(folder, "zig-cache").absolute())}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode != 0 or not Path(folder, output).is_file():
            lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            why = next((line for line in lines if _tells(line)), lines[-1] if lines else "no message")
            raise MissingDependencyError(f"'{' '.join(self.command)}' could not link the library: {why.strip()}")


def find_toolchain(target: Target, libc: str | None = None) -> Toolchain:
    """What links for ``target`` against ``libc``: ``glibc-2.28`` (any version), ``musl``, or None.

    None is the C library of the system's compiler: $CC, cc, gcc or clang for this architecture, a cross compiler for
    another, and glibc 2.28 of ziglang where there is none of these. A version of glibc is always ziglang's, for a
    system's compiler links only against the one that is installed. Raises UsageError for another ``libc`` and
    MissingDependencyError where no compiler can do it.
    """
    architecture = target.architecture
    check_libc(libc)
    if libc is None:
        candidates, install = _of_the_system(architecture)
    elif libc == MUSL:
        candidates, install = _for_musl(architecture)
    else:
        candidates, install = [], ""
    for candidate in candidates:
        command = candidate.split()
        if command and shutil.which(command[0]):
            return Toolchain((*command, _BASELINE[architecture], _SEPARATE, *_OPTIONS[architecture]))
    if importlib.util.find_spec("ziglang"):
        return Toolchain((*_zig(architecture, libc or DEFAULT_GLIBC), *_OPTIONS[architecture]))
    against = f" against {libc}" if libc else ""
    ways = " or ".join(filter(None, (install, "`pip install ziglang`")))
    raise MissingDependencyError(
        f"a C compiler that links for {architecture}{against} is needed and none was found; install one: {ways}"
    )


def check_libc(libc: str | None) -> None:
    """Raise UsageError for what is neither None, ``musl`` nor a glibc that can be linked against."""
    if libc is None or libc == MUSL:
        return
    version = _GLIBC.fullmatch(libc)
    if version is None:
        raise UsageError(f"C library '{libc}': give musl, or a version of glibc, such as {DEFAULT_GLIBC}")
    if (int(version[1]), int(version[2])) < _OLDEST_GLIBC or int(version[1]) > 2:
        oldest = ".".join(map(str, _OLDEST_GLIBC))
        raise UsageError(f"C library '{libc}': glibc can be chosen from {oldest} on, such as {DEFAULT_GLIBC}")


def _of_the_system(architecture: str) -> tuple[list[str], str]:
    if architecture == host_architecture():
        return [os.environ.get("CC", ""), "cc", "gcc", "clang"], "`apt-get install gcc`"
    package = f"gcc-{architecture.replace('_', '-')}-linux-gnu"
    return [f"{architecture}-linux-gnu-gcc"], f"`apt-get install {package}`"


def _for_musl(architecture: str) -> tuple[list[str], str]:
    candidates = [f"{architecture}-linux-musl-gcc"]
    if architecture == host_architecture():
        return [*candidates, "musl-gcc"], "`apt-get install musl-tools`"
    return candidates, ""


def _zig(architecture: str, libc: str) -> list[str]:
    abi = "musl" if libc == MUSL else f"gnu.{libc.removeprefix('glibc-')}"
    return [sys.executable, "-m", "ziglang", "cc", "-target", f"{architecture}-linux-{abi}"]


def _tells(line: str) -> bool:
    """Whether a line of a compiler's says what is wrong: the linker calls a symbol that is missing no error."""
    return "error" in line.lower() or "undefined" in line.lower()
