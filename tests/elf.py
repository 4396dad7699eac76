"""What an ELF file asks of the machine: its processor, libraries, symbols and their versions. No code of Pumice's."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

_MACHINES = {62: "x86_64", 183: "aarch64"}
_NEEDED, _UNDEFINED, _NO_BITS = 1, 0, 8


@dataclass(frozen=True)
class Elf:
    """A 64-bit little-endian file, by its section headers."""

    machine: str
    sections: dict[str, bytes]

    @classmethod
    def read(cls, path: Path) -> Elf:
        """The whole file."""
        data = path.read_bytes()
        header = struct.unpack_from("<16sHHIQQQIHHHHHH", data)
        machine, table, count, names_index = header[2], header[6], *header[-2:]
        headers = [struct.unpack_from("<IIQQQQIIQQ", data, table + 64 * i) for i in range(count)]
        names = data[headers[names_index][4] :]
        found = {}
        for name, kind, _, _, offset, size, *_ in headers:
            found[_string(names, name)] = b"" if kind == _NO_BITS else data[offset : offset + size]
        return cls(_MACHINES[machine], found)

    @property
    def needed(self) -> list[str]:
        """The libraries that the loader must find."""
        entries = struct.iter_unpack("<QQ", self.sections[".dynamic"])
        return [self._name(value) for tag, value in entries if tag == _NEEDED]

    @property
    def undefined(self) -> set[str]:
        """The symbols that other libraries must have."""
        return {name for name, section in self._symbols() if section == _UNDEFINED and name}

    @property
    def exported(self) -> set[str]:
        """The symbols that it offers."""
        return {name for name, section in self._symbols() if section != _UNDEFINED and name}

    @property
    def glibc(self) -> tuple[int, ...]:
        """The newest version of glibc that a symbol asks for, as numbers; empty without any."""
        strings = self.sections[".dynstr"].decode().split("\0")
        asked = [name.removeprefix("GLIBC_") for name in strings if name.startswith("GLIBC_")]
        return max((tuple(map(int, version.split("."))) for version in asked), default=())

    def _symbols(self) -> list[tuple[str, int]]:
        entries = struct.iter_unpack("<IBBHQQ", self.sections[".dynsym"])
        return [(self._name(name), section) for name, _, _, section, _, _ in entries]

    def _name(self, offset: int) -> str:
        return _string(self.sections[".dynstr"], offset)


def _string(table: bytes, offset: int) -> str:
    return table[offset : table.index(b"\0", offset)].decode()
