"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from pumice.errors import UsageError


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


def move_into_place(source: Path, path: Path) -> None:
    """Copy ``source`` to ``path`` through a temporary file beside it. Raises UsageError where it cannot be written."""
    temporary: Path | None = None
    _check_replaceable(path)
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{path.name[:64]}.", dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            with source.open("rb") as whole:
                shutil.copyfileobj(whole, file)
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


def _cannot_write(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{path}: cannot be written: {error.strerror or error}")
