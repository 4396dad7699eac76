"""A database of kernel times: what ``pumice tune`` measured, in a file of JSON lines that is only appended to.

    {"machine": {"cpu": "AMD EPYC 9B45", "isa": "vnni512", "threads": 1, "llvm": "znver5 +sse3 ...", "pumice": "0.1.0"}}
    {"workload": "int8, 64x9x64 ...", "left": [0.1, ...], "shared": 1, "dense": false, "tiling": [8, 16, 64], "ns": 123}

A line that names a machine holds for those below it, so files are merged by ``cat``. What a process was writing when
it was killed is a line without its end: it is not read, and the next writer takes it away.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pumice.appending import Append, open_to_append
from pumice.errors import UsageError
from pumice.schedules.tiling import FORMS, Candidate, Form, Tiling
from pumice.targets.detect import host_cpu
from pumice.targets.target import Target

_ALIKE = 0.05  # by which the share of blocks that are left may differ between weights that take as long
_LONGEST_TILE = 64  # vectors; no instruction set has as many registers
_FIRST = '{"machine": '
_NO_DATABASE = "is no tuning database; `pumice tune` writes one"


@dataclass(frozen=True)
class Machine:
    """What times hold for: the CPU's model, the instruction set, threads, LLVM's options, Pumice's version."""

    cpu: str
    isa: str
    threads: int
    llvm: str
    pumice: str

    @classmethod
    def of(cls, target: Target, threads: int) -> Machine:
        """What code for ``target`` runs on: this machine if it is native, else one that is called like the target."""
        options = [str(target.tvm.attrs.get("mcpu", "")), *map(str, target.tvm.attrs.get("mattr", []))]
        cpu = host_cpu() if target.name == "native" else target.name
        return cls(cpu, target.isa, threads, " ".join(options), version("pumice"))

    def resembles(self, other: Machine) -> bool:
        """Whether it runs the same kernels, be it on another CPU."""
        return (self.isa, self.threads, self.pumice) == (other.isa, other.threads, other.pumice)

    def __str__(self) -> str:
        return f"{self.cpu} ({self.isa}, {self.threads} threads, pumice {self.pumice})"


@dataclass(frozen=True)
class Workload:
    """A layer, as far as its kernels' time depends on it: what it computes in words, and which blocks are there.

    ``left`` are the shares of blocks that are not zero, for each of the ways to share them between rows.
    """

    text: str
    left: tuple[float, ...]

    def resembles(self, other: Workload) -> bool:
        """Whether its kernels take as long."""
        if self.text != other.text or len(self.left) != len(other.left):
            return False
        return all(abs(a - b) <= _ALIKE * max(a, b) for a, b in zip(self.left, other.left, strict=True))


@dataclass(frozen=True)
class Measurement:
    """One kernel's time."""

    workload: Workload
    candidate: Candidate
    nanoseconds: float

    def to_json(self) -> dict[str, Any]:
        """As its line holds it."""
        form, tiling = self.candidate
        return {
            "workload": self.workload.text,
            "left": list(self.workload.left),
            "shared": form.shared,
            "dense": form.is_dense,
            "tiling": tiling and [tiling.vectors, tiling.words, tiling.rows],
            "ns": round(self.nanoseconds, 1),
        }

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Measurement:
        """The inverse. Raises KeyError, TypeError or ValueError for what is none."""
        form = Form(entry["shared"], entry["dense"])
        tiling = None if entry["tiling"] is None else Tiling(*map(_positive, entry["tiling"]))
        if form not in FORMS or (tiling and (tiling.rows % 4 or tiling.vectors > _LONGEST_TILE)):
            raise ValueError("no kernel is like that")
        if not 0 <= entry["ns"] < float("inf"):
            raise ValueError("no time is like that")
        return cls(Workload(str(entry["workload"]), tuple(map(float, entry["left"]))), (form, tiling), entry["ns"])


@dataclass(frozen=True)
class Measurements:
    """What was measured on one machine; the last time of a kernel counts."""

    machine: Machine
    entries: list[Measurement] = field(default_factory=list)

    def of(self, workload: Workload) -> dict[Candidate, float]:
        """Nanoseconds of each kernel that was measured for such a layer; nothing if none was."""
        return {entry.candidate: entry.nanoseconds for entry in self.entries if entry.workload.resembles(workload)}


def read_measurements(path: str | Path, machine: Machine) -> Measurements:
    """What the file has for ``machine``, else for another CPU that runs the same kernels, the one measured last.

    Raises UsageError: a file that cannot be read, that is no such database, or that has nothing for the machine.
    """
    found = _read(Path(path))
    if machine in found:
        return found[machine]
    for other in reversed(found):
        if machine.resembles(other):
            return found[other]
    listed = ", ".join(map(str, found)) or "nothing"
    raise UsageError(f"{path}: has times of {listed}, and none for {machine}; run `pumice tune` for it")


def format_time(nanoseconds: float) -> str:
    """``1.23 ms``, ``45.6 us``."""
    return f"{nanoseconds * 1e-6:.3g} ms" if nanoseconds >= 1e5 else f"{nanoseconds * 1e-3:.3g} us"


class Journal:
    """A database that one process adds to; ``measurements`` is what it has for the machine."""

    def __init__(self, found: dict[Machine, Measurements], append: Append, machine: Machine) -> None:
        self.measurements = found.get(machine, Measurements(machine))
        self._append = append
        self._is_current = bool(found) and list(found)[-1] == machine

    def add(self, entries: Sequence[Measurement]) -> None:
        """Write a line for each, all of them at once."""
        lines = [entry.to_json() for entry in entries]
        if not self._is_current:
            lines.insert(0, {"machine": asdict(self.measurements.machine)})
        self._append([json.dumps(line) for line in lines])
        self._is_current = True
        self.measurements.entries.extend(entries)


@contextmanager
def open_journal(path: str | Path, machine: Machine) -> Iterator[Journal]:
    """The database at ``path``, made if it is not there.

    Raises UsageError: a file that is no database, that cannot be written, or that another process adds to.
    """
    with open_to_append(Path(path), _read, "`pumice tune`") as (found, append):
        yield Journal(found, append, machine)


def _read(path: Path) -> dict[Machine, Measurements]:
    """What the file holds; the machine named last comes last."""
    try:
        *lines, rest = path.read_text().split("\n")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: {_NO_DATABASE}") from error
    found: dict[Machine, Measurements] = {}
    if not (lines or rest[: len(_FIRST)] in (_FIRST[: len(rest)], "")):
        raise UsageError(f"{path}: {_NO_DATABASE}")
    current: Measurements | None = None
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if "machine" in entry:
                machine = Machine(**entry["machine"])
                found[machine] = current = found.pop(machine, Measurements(machine))
                continue
            measurement = Measurement.from_json(entry)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = "is no measurement; delete the line, or tune anew"
            raise UsageError(f"{path}, line {number}: {what}" if current else f"{path}: {_NO_DATABASE}") from error
        if current is None:
            raise UsageError(f"{path}: {_NO_DATABASE}")
        current.entries.append(measurement)
    return found


def _positive(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r} is no whole number above 0")
    return value
