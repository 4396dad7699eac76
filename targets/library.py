"""From a plan to one shared library with its weights and manifest inside, written whole or not at all.

The weights are a section of their own, read-only and on pages of their own: the loader maps it, and nothing of it is
copied or even read before a kernel does.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pumice.errors import UsageError
from pumice.targets.build import build
from pumice.targets.manifest import SECTION, encode_manifest
from pumice.targets.plan import Plan
from pumice.targets.target import Target
from pumice.targets.toolchain import find_toolchain

WEIGHTS_SYMBOL = "pumice_weights"

_DATA = f"""
.section {SECTION},"a",%progbits
.incbin "manifest.json"

.section .pumice.weights,"a",%progbits
.balign 4096
.globl {WEIGHTS_SYMBOL}
.type {WEIGHTS_SYMBOL}, %object
{WEIGHTS_SYMBOL}:
.incbin "weights.bin"
.byte 0
.size {WEIGHTS_SYMBOL}, . - {WEIGHTS_SYMBOL}

.section .note.GNU-stack,"",%progbits
"""


def write_library(
    plan: Plan, target: Target, manifest: dict[str, Any], path: str | Path, libc: str | None = None
) -> None:
    """Build ``plan`` for ``target`` and link it, with ``manifest``, into the shared library ``path``.

    ``libc`` is the C library of the box, as ``find_toolchain`` takes it.
    The manifest gets the plan's ``steps`` and the bytes of ``workspace`` and ``weights``. The library is linked
    elsewhere and moved into place when it is complete: on any failure what was at ``path`` stays. The same plan and
    manifest give the same bytes. Raises UsageError where ``path`` cannot be written and MissingDependencyError
    without a C compiler.
    """
    path = Path(path)
    toolchain = find_toolchain(target, libc)
    code = build(plan, target)
    planned = {
        "steps": [step.to_json() for step in plan.steps],
        "workspace": plan.workspace,
        "scratch": code.scratch,
        "weights": plan.weights.nbytes,
    }
    with tempfile.TemporaryDirectory(prefix="pumice-") as temporary:
        folder = Path(temporary)
        code.module.write_to_file(str(folder / "code.o"))
        _write_data(manifest | planned, plan, folder)
        toolchain.link("linked.so", ["code.o", "data.s"], folder)
        move_into_place(folder / "linked.so", path)


def check_destination(path: str | Path) -> None:
    """Raise UsageError when a file cannot be written at ``path``: asked before a long compilation, not after."""
    path = Path(path)
    _check_replaceable(path)
    try:
        descriptor, probe = tempfile.mkstemp(prefix=f".{path.name[:64]}.", dir=path.parent)
        os.close(descriptor)
        Path(probe).unlink()
    except OSError as error:
        raise _cannot_write(path, error) from error


def move_into_place(library: Path, path: Path) -> None:
    """Copy ``library`` to ``path`` through a temporary file beside it. Raises UsageError where it cannot be written."""
    temporary: Path | None = None
    _check_replaceable(path)
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{path.name[:64]}.", dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            with library.open("rb") as source:
                shutil.copyfileobj(source, file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _check_replaceable(path: Path) -> None:
    """Only a file is replaced by a file: as root, a rename onto ``/dev/null`` would take it from everyone."""
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; give the name of the file to write, such as {path / 'model.so'}")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: is a device or a pipe, which a file would replace; give the name of a file")


def _write_data(manifest: dict[str, Any], plan: Plan, folder: Path) -> None:
    """An assembler file that is nothing but the sections; allocated (``a``), so that ``strip`` leaves them alone."""
    Path(folder, "manifest.json").write_bytes(encode_manifest(manifest))
    plan.weights.tofile(folder / "weights.bin")
    Path(folder, "data.s").write_text(_DATA)


def _cannot_write(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{path}: cannot be written: {error.strerror or error}")
