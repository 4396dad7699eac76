"""NumPy archives (.npz): read without running anything, written whole or not at all."""

from __future__ import annotations

import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pumice.errors import UsageError
from pumice.files import move_into_place

_SUSPICIOUS_BYTES = 1 << 30
_SUSPICIOUS_RATIO = 200


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name.

    Raises UsageError for a file that is no such archive, holds Python objects (a pickle could run code and is never
    read), or is small and unpacks to gigabytes.
    """
    path = Path(path)
    try:
        packed = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > _SUSPICIOUS_BYTES and unpacked > _SUSPICIOUS_RATIO * packed:
            raise UsageError(f"{path}: {packed} bytes unpack to {unpacked}; that is not read for safety")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, MemoryError) as error:
        why = "it holds Python objects" if "allow_pickle" in str(error) else str(error) or type(error).__name__
        raise UsageError(
            f"{path}: is not an archive of arrays ({why}); write one with numpy.savez(path, name=array)"
        ) from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # an archive may hold other files, which NumPy hands out as bytes
            raise UsageError(f"{path}: its entry '{name}' is not an array; write it with numpy.savez")
    return arrays


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a .npz that ``read_arrays`` reads, under any names. Raises UsageError where it cannot be written."""
    with tempfile.TemporaryDirectory(prefix="pumice-") as folder:
        complete = Path(folder, "arrays.npz")
        # numpy.savez takes names as keyword arguments, where 'file' is its own, and refuses '/' in none of them
        with zipfile.ZipFile(complete, "w") as archive:
            for name, array in arrays.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)
        move_into_place(complete, Path(path))
