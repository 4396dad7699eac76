"""Run kernels for ARM on this machine: cross-compiled, linked, and executed by QEMU.

Linking takes longer than most kernels, so many go into one library: ``together`` runs cases side by side, each in a
thread that waits for its kernel until all others wait too, and then builds and runs what they wait for at once.
"""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tvm
from emulation import NEWEST, emulator, missing

from pumice.targets.build import build
from pumice.targets.plan import ALIGNMENT, WEIGHTS, Plan, Step, View, align
from pumice.targets.target import Target
from pumice.targets.toolchain import find_toolchain

TARGETS = {"neon": "armv8-a", "dotprod": "armv8.2-a+dotprod", "i8mm": "armv8.6-a+i8mm"}

_CPUS = {"neon": "cortex-a53", "dotprod": "cortex-a76", "i8mm": NEWEST}  # that QEMU plays: none can do more than it may
_TASKS = 3  # threads that a kernel is shared out to, one after the other
_GUARD = 0x5C  # what lies between the arrays, and must stay

needs_emulation = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@dataclass(eq=False)
class Call:
    """A kernel and its arguments, the last ``outputs`` of which it writes; then ``results``."""

    function: tvm.tirx.PrimFunc
    arrays: Sequence[np.ndarray]
    outputs: int
    results: list[np.ndarray] = field(default_factory=list)


def run_kernel_for(function: tvm.tirx.PrimFunc, isa_name: str, *arrays: np.ndarray, outputs: int) -> list[np.ndarray]:
    """What ``function`` makes of its last ``outputs`` arrays; together with others if called by ``together``."""
    call = Call(function, [np.ascontiguousarray(array) for array in arrays], outputs)
    case = _CASES.get(threading.get_ident())
    if case is None:
        execute([call], isa_name)
    else:
        case.wait_for(call)
    return call.results


def together(isa_name: str, cases: Mapping[str, Callable[[], None]]) -> None:
    """Run all cases. Raises an exception group of what they raised, each with its name."""
    waiting = [_Case(name, body) for name, body in cases.items()]
    for case in waiting:
        case.step()
    while calls := [case.call for case in waiting if case.call is not None]:
        execute(calls, isa_name)
        for case in waiting:
            if case.call is not None:
                case.step()
    failed = [case.error for case in waiting if case.error is not None]
    if failed:
        raise ExceptionGroup(f"{len(failed)} of {len(waiting)} cases for {isa_name}", failed)


class _Case:
    """A thread that runs only while ``step`` waits for it: never two at once."""

    def __init__(self, name: str, body: Callable[[], None]) -> None:
        self.call: Call | None = None
        self.error: Exception | None = None
        self._name, self._body = name, body
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def step(self) -> None:
        """Run until the next kernel or the end."""
        self.call = None
        self._go.release()
        self._stopped.acquire()

    def wait_for(self, call: Call) -> None:
        """In the case's own thread: stop until ``call`` has its results."""
        self.call = call
        self._stopped.release()
        self._go.acquire()

    def _run(self) -> None:
        self._go.acquire()
        _CASES[threading.get_ident()] = self
        try:
            self._body()
        except Exception as error:
            error.add_note(self._name)
            self.error = error
        finally:
            del _CASES[threading.get_ident()]
            self.call = None
            self._stopped.release()


_CASES: dict[int, _Case] = {}


def execute(calls: Sequence[Call], isa_name: str) -> None:
    """Build all calls into one library and run it; only what is an output may change."""
    target = Target.parse(TARGETS[isa_name])
    memory, places = _lay_out(calls)
    kernels = {f"kernel{i}": call.function for i, call in enumerate(calls)}
    steps = tuple(
        Step(name, tuple(View(WEIGHTS, at) for at in place)) for name, place in zip(kernels, places, strict=True)
    )
    code = build(Plan(kernels, steps, memory, 0, (), ()), target, for_tvm=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code.module.write_to_file(str(folder / "code.o"))
        find_toolchain(target).link("kernels.so", ["code.o"], folder)
        memory.tofile(folder / "memory")
        parts = [_runner(), folder / "kernels.so", folder / "memory", code.scratch, len(steps), _TASKS]
        command = [*emulator(_CPUS[isa_name]), *map(str, parts)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"exit {done.returncode}: {done.stderr}"
        after = np.fromfile(folder / "memory", np.uint8)
    for call, place in zip(calls, places, strict=True):
        for array, at in list(zip(call.arrays, place, strict=True))[-call.outputs :]:
            written = slice(at, at + array.nbytes)
            call.results.append(after[written].view(array.dtype).reshape(array.shape).copy())
            memory[written] = after[written]
    np.testing.assert_array_equal(after, memory, "a kernel wrote beside its outputs")


def _lay_out(calls: Sequence[Call]) -> tuple[np.ndarray, list[list[int]]]:
    """All arguments in one block of memory, and where each begins."""
    places, size = [], ALIGNMENT
    for call in calls:
        places.append([])
        for array in call.arrays:
            places[-1].append(size)
            size = align(size + array.nbytes + 1)
    memory = np.full(size, _GUARD, np.uint8)
    for call, place in zip(calls, places, strict=True):
        for array, at in zip(call.arrays, place, strict=True):
            memory[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
    return memory, places


@cache
def _runner() -> Path:
    folder = tempfile.mkdtemp()
    source = Path(__file__).with_name("arm_runner.c")
    options = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-o", f"{folder}/runner", str(source), "-ldl"]
    subprocess.run([*find_toolchain(Target.parse("armv8-a")).command, *options], check=True)
    return Path(folder, "runner")
