"""The manifest of a compiled library: what it holds, in an ELF section that is read without loading the library.

``.pumice.manifest`` holds one JSON object. It is read from the section headers in plain Python, so that a library
for another machine can be inspected, and one that this CPU cannot run is refused before any of its code is mapped.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

from pumice.errors import ModelError

SECTION = ".pumice.manifest"
FORMAT = 2  # of the JSON object; a reader refuses a newer one

_MAX_BYTES = 64 << 20  # no manifest comes near: a corrupt header must not make the reader allocate gigabytes
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")  # Elf64_Ehdr
_SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")  # Elf64_Shdr
_MACHINES = {62: "x86_64", 183: "aarch64"}


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """The section's bytes: the same for the same manifest."""
    return json.dumps({"format": FORMAT, **manifest}, sort_keys=True, separators=(",", ":")).encode()


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a library that Pumice compiled, for whatever machine.

    Raises ModelError when the file is not such a library, is cut off, has lost its section, or was written by a
    newer version of Pumice.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = _read_section(file, path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        manifest = json.loads(data)
        form = manifest["format"]
        required = [
            manifest[key]
            for key in ("target", "inputs", "outputs", "layers", "steps", "workspace", "weights", "versions")
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path}: its section {SECTION} is damaged; compile the model again") from error
    if form != FORMAT or None in required:
        raise ModelError(
            f"{path}: its manifest has format {form}, and this version of Pumice reads format {FORMAT}; "
            "compile the model again, or install the version that wrote it"
        )
    return dict(manifest)


def _read_section(file: BinaryIO, path: Path) -> bytes:
    """The bytes of ``SECTION``; every offset is held against the file's length before it is followed."""
    size = file.seek(0, 2)

    def read(offset: int, length: int) -> bytes:
        if offset + length > size:
            raise ModelError(f"{path}: is cut off ({size} bytes, needs {offset + length}); copy or compile it again")
        file.seek(offset)
        return file.read(length)

    magic = read(0, min(size, 4))
    if magic != b"\x7fELF":
        what = "is empty" if size == 0 else "is not a shared library (no ELF header)"
        raise ModelError(f"{path}: {what}; give a file that `pumice compile` wrote")
    fields = _HEADER.unpack(read(0, _HEADER.size))
    ident, machine, table, entry_size, count, names_index = fields[0], fields[2], fields[6], *fields[11:14]
    if ident[4:6] != b"\x02\x01" or machine not in _MACHINES:
        raise ModelError(
            f"{path}: is a library for a machine that Pumice never compiles for (ELF machine {machine}), "
            f"not for {' or '.join(_MACHINES.values())}"
        )
    if not table or entry_size != _SECTION_HEADER.size or names_index >= count:
        raise ModelError(f"{path}: has no section table, so its manifest is lost (stripped?); compile it again")
    headers = list(_SECTION_HEADER.iter_unpack(read(table, entry_size * count)))
    names_offset, names_size = headers[names_index][4:6]
    if names_size > _MAX_BYTES:
        raise ModelError(f"{path}: its section table is damaged; copy or compile it again")
    names = read(names_offset, names_size)
    wanted = SECTION.encode() + b"\0"
    for name, _, _, _, offset, length, *_ in headers:
        if names[name : name + len(wanted)] == wanted:
            if length > _MAX_BYTES:
                raise ModelError(f"{path}: its section {SECTION} is damaged; compile the model again")
            return read(offset, length)
    raise ModelError(f"{path}: has no section {SECTION}: it was not written by `pumice compile`, or was stripped")
