"""From a lowered module to one shared library with its manifest inside, written whole or not at all."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tvm.ir import IRModule

from pumice.errors import MissingDependencyError, UsageError
from pumice.targets.build import build
from pumice.targets.detect import host_architecture
from pumice.targets.manifest import SECTION, encode_manifest
from pumice.targets.target import Target


def write_library(lowered: IRModule, target: Target, manifest: dict[str, Any], path: str | Path) -> None:
    """Build ``lowered`` for ``target`` and link it, with ``manifest``, into the shared library ``path``.

    ``lowered`` holds TIR functions and a ``main`` that calls them, its weights bound as constants. The library is
    linked elsewhere and moved into place when it is complete: on any failure what was at ``path`` stays. The same
    module and manifest give the same bytes. Raises UsageError where ``path`` cannot be written and
    MissingDependencyError without a C compiler.
    """
    path = Path(path)
    compiler = find_compiler(target)
    executable = build(lowered, target)
    with tempfile.TemporaryDirectory(prefix="pumice-") as folder:
        section = _manifest_source(manifest, Path(folder))
        linked = Path(folder, "linked.so")

        def link(output: str, objects: list[str], **_: Any) -> None:
            _link(compiler, output, objects, Path(folder))

        executable.export_library(str(linked), fcompile=link, addons=[section.name], workspace_dir=folder)
        move_into_place(linked, path)


def find_compiler(target: Target) -> list[str]:
    """The command that assembles and links for ``target``: $CC, a C compiler of the system, or ziglang's."""
    if target.architecture == host_architecture():
        candidates = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
        install = "`apt-get install gcc`, or `pip install ziglang`"
    else:
        candidates = [f"{target.architecture}-linux-gnu-gcc"]
        install = f"`apt-get install gcc-{target.architecture}-linux-gnu`, or `pip install ziglang`"
    for candidate in candidates:
        command = candidate.split()
        if command and shutil.which(command[0]):
            return command
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc", "-target", f"{target.architecture}-linux-gnu"]
    raise MissingDependencyError(
        f"a C compiler that links for {target.architecture} is needed and none was found; install one: {install}"
    )


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


def _manifest_source(manifest: dict[str, Any], folder: Path) -> Path:
    """An assembler file that is nothing but the section; allocated (``a``), so that ``strip`` leaves it alone."""
    Path(folder, "manifest.json").write_bytes(encode_manifest(manifest))
    source = Path(folder, "manifest.s")
    source.write_text(
        f'.section {SECTION},"a",%progbits\n.incbin "manifest.json"\n.section .note.GNU-stack,"",%progbits\n'
    )
    return source


def _link(compiler: list[str], output: str, objects: list[str], folder: Path) -> None:
    """One command does both; it runs in ``folder``, and no path reaches the library."""
    # The table of local symbols is a tenth of a small library, and nothing reads it.
    command = [*compiler, "-shared", "-fPIC", "-Wl,-s", "-o", output, *objects, "-lm"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0 or not Path(output).is_file():
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        why = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")
        raise MissingDependencyError(f"'{' '.join(compiler)}' could not link the library: {why.strip()}")


def _cannot_write(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{path}: cannot be written: {error.strerror or error}")
