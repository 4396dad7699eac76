"""Whole networks as what ships: one file for each kind of box, run the way it would be there.

    python -m bench.shipping [--networks demo minilm] [--targets native armv8-a cuda] [--zeros 0] [--json out.json]

Each network, in int8 with 90 % of its 1x4 blocks zero, is calibrated once and compiled for every target. Then

- ``native``: a C program (``start.c``) opens it in a root that has libc and nothing else, in fresh processes: what it
  takes from dlopen to the first result, and what memory, against the weights, the plan and 10 MB;
- ARM: the C example verifies every step under qemu, on a CPU that has no more than the level asks for;
- ``cuda``: compiled for every architecture, and its kernels emulated on this CPU, step by step.

The same numbers means: of each step, to the bit, what the library stores; see docs/shipping.md. Needs a C compiler, for
ARM qemu, for CUDA nvcc and g++.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tvm import DataType, tirx
from tvm.ir import IRModule

from bench.boxes import EXAMPLE, NEWEST, START, build_program, empty_root, emulator, run_start
from bench.processes import fresh_processes, write_runs
from bench.pruning import prune_blocks
from bench.subjects import SUBJECTS
from bench.tables import markdown, number
from pumice.frontend import read_model
from pumice.passes.link_steps import link_steps
from pumice.passes.pipeline import LowerOptions, lower
from pumice.prepare import prepare
from pumice.recipe import Recipe
from pumice.stages import Stages
from pumice.targets.build_cuda import CudaCode
from pumice.targets.check import Check, checksum
from pumice.targets.cuda_emulation import Emulation
from pumice.targets.cuda_source import cuda_source
from pumice.targets.detect import host_architecture
from pumice.targets.executor import plain_manifest
from pumice.targets.library import build_code, write_library
from pumice.targets.plan import SCRATCH, WEIGHTS, WORKSPACE, Plan, aligned
from pumice.targets.target import Target
from pumice.verify import make_check

ZEROS = 0.9
ALLOWED = 10 << 20  # bytes of memory beyond weights and plan: libc, code, the program's own
PROCESSES = 11

# The CPU on which each level is tried: one that has what the level needs, and no more where qemu knows such a one.
CPUS = {"armv8-a": "cortex-a53", "armv8.2-a+dotprod": "cortex-a76", "armv8.6-a+i8mm": NEWEST}

_CALIBRATION_SAMPLES = 4


@dataclass(frozen=True)
class Start:
    """What it takes to get a first result; memory in bytes."""

    milliseconds: float  # the median
    resident: int  # most of all processes
    own: int  # of it, what no other process shares: what one more process costs
    is_in_empty_root: bool


@dataclass(frozen=True)
class Shipped:
    """One network for one target; sizes in bytes."""

    network: str
    target: str
    isa: str
    gpus: Sequence[str]  # architectures that there is code for
    file: int
    weights: int
    plan: int  # workspace and scratch: the peak of what lives at once
    steps: int
    exact: int  # the steps that give the same bits everywhere; behind them outputs are compared with a tolerance
    how: str  # it was tried
    is_same: bool | None  # None: not tried
    foreign: Sequence[str]  # symbols that neither libc nor libm has
    start: Start | None

    @property
    def bound(self) -> int:
        """What may be resident."""
        return self.weights + self.plan + ALLOWED


def ship(network: str, targets: Sequence[str], zeros: float = ZEROS, emulate: bool = True) -> list[Shipped]:
    """Compile ``network``, with this share of zero blocks, for every target and try it; CUDA kernels if ``emulate``."""
    subject = SUBJECTS[network]
    feed = subject.feed(_CALIBRATION_SAMPLES)
    model = read_model(prune_blocks(subject.model(), zeros, subject.pointwise_only), None)
    options = Recipe(equalize=False, correct_bias=False)
    mod = prepare(model, options, feed, None, Stages(None))
    return [_ship(mod, feed, subject.title, Target.parse(name), emulate) for name in targets]


def _ship(mod: IRModule, feed: Mapping[str, np.ndarray], network: str, target: Target, emulate: bool) -> Shipped:
    _say(f"{network} for {target.name}")
    options = LowerOptions(1)
    plan = link_steps(lower(mod, target, options))
    code = build_code(plan, target)
    check = make_check(mod, target, options, plan, code, feed)
    with TemporaryDirectory(prefix="pumice-") as folder:
        library = Path(folder, "model.so")
        write_library(plan, target, plain_manifest(plan, target), library, None, check, code)
        start = None
        if isinstance(code, CudaCode):
            how = f"code for {len(code.cubins)} GPUs" + (", emulated" if emulate else "")
            is_same = runs_emulated(code.plan, code.scratch, check) if emulate else None
        elif target.runs_here:
            start, is_same = first_result(library, check.inputs)
            how = "C, empty root" if start.is_in_empty_root else "C"
        else:
            cpu = CPUS[target.name]
            how, is_same = f"C, qemu {cpu.split(',')[0]}", runs_under_qemu(library, target, cpu)
        return Shipped(
            network,
            target.name,
            target.isa,
            list(code.cubins) if isinstance(code, CudaCode) else [],
            library.stat().st_size,
            plan.weights.nbytes,
            plan.workspace + code.scratch,
            len(plan.steps),
            check.exact,
            how,
            is_same,
            foreign_symbols(library) if target.architecture == host_architecture() else [],
            start,
        )


def first_result(library: Path, inputs: Sequence[np.ndarray], processes: int = PROCESSES) -> tuple[Start, bool]:
    """``start.c`` on ``library`` in fresh processes after one that does not count; whether all of them verify it.

    In a root with nothing but libc for the superuser, who alone may change roots; as it is for anyone else.
    """
    program = build_program(Target.parse("native"), START, library, links=False)
    sample = library.with_name("sample")
    sample.write_bytes(b"".join(array.tobytes() for array in inputs))
    is_root = os.geteuid() == 0
    with TemporaryDirectory(prefix="pumice-") as root:
        command = [str(program), str(library), "1", str(sample)]
        if is_root:
            empty_root(Path(root), program, library)
            shutil.copy(sample, root)
            command = ["chroot", root, f"/{program.name}", f"/{library.name}", "1", f"/{sample.name}"]
        runs = [run_start(command) for _ in range(1 + processes)]
    milliseconds = statistics.median(run["ms"] for run in runs[1:])
    resident, own = (max(run[key] for run in runs) for key in ("resident", "own"))
    return Start(milliseconds, resident, own, is_root), not any(run["status"] for run in runs)


def runs_under_qemu(library: Path, target: Target, cpu: str) -> bool:
    """Whether the C example, compiled for ARM, verifies ``library`` on an emulated CPU."""
    program = build_program(target, EXAMPLE, library, links=False)
    done = subprocess.run([*emulator(cpu), program, "-v", library], capture_output=True, text=True, check=False)
    if done.returncode:
        _say(done.stderr.strip())
    return done.returncode == 0


def runs_emulated(plan: Plan, scratch: int, check: Check) -> bool:
    """Whether the CUDA kernels of ``plan``, emulated on this CPU, write what ``check`` has, step by step.

    Each step gets copies of its arguments between pages that nothing may touch: raises EmulationError where a kernel
    goes beyond them.
    """
    emulation = Emulation(cuda_source(plan.kernels))
    outputs = [np.zeros(shape, dtype) for shape, dtype in plan.outputs]
    memory = {WEIGHTS: plan.weights, WORKSPACE: _zeros(plan.workspace), SCRATCH: _zeros(scratch)}
    buffers = [_bytes(array) for array in (*(memory[i] for i in sorted(memory)), *check.inputs, *outputs)]
    for index, step in enumerate(plan.steps):
        sizes = [_size(buffer) for buffer in plan.kernels[step.kernel].params]
        arrays = [buffers[view.buffer][view.offset :][:size] for view, size in zip(step.arguments, sizes, strict=True)]
        emulation.run(step.kernel, *arrays)
        results = arrays[len(arrays) - len(step.outputs) :]
        written = [array[:size].data for array, size in zip(results, step.outputs, strict=True)]
        if index < check.exact and checksum(*written) != check.checksums[index]:
            _say(f"step {index} ({step.layer or step.kernel}) gives other numbers when it is emulated")
            return False
    return all(map(_agrees, outputs, check.outputs, [check.tolerance] * len(outputs)))


def _agrees(output: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    if output.dtype.kind != "f":
        return bool(np.abs(output.astype(np.int64) - expected).max() <= 1)
    return bool(np.abs(output - expected).max() <= tolerance * np.abs(expected).max())


def _zeros(size: int) -> np.ndarray:
    memory = aligned((size,), "uint8")
    memory.fill(0)
    return memory


def _bytes(array: np.ndarray) -> np.ndarray:
    found: np.ndarray = array.reshape(-1).view(np.uint8)
    return found


def _size(buffer: tirx.Buffer) -> int:
    return math.prod(int(size) for size in buffer.shape) * int(DataType(str(buffer.dtype)).itemsize)


def foreign_symbols(library: Path) -> list[str]:
    """The symbols that ``library`` needs and that neither libc nor libm has, of the system that it is linked for."""
    listed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    systems = re.findall(r"(/\S+/lib[cm]\.so\S*) \(0x", listed)
    return sorted(_symbols(library, "--undefined-only").difference(*(_symbols(p, "--defined-only") for p in systems)))


def _symbols(library: Path | str, kind: str) -> set[str]:
    done = subprocess.run(["nm", "-D", "-P", kind, str(library)], capture_output=True, text=True, check=True)
    return {line.split()[0].split("@")[0] for line in done.stdout.splitlines()}


def table(results: Sequence[Shipped]) -> str:
    """Markdown: a line for each network and target; millions of bytes."""
    rows = [["network", "target", "file", "weights", "plan", "resident", "allowed", "own", "ms", "the same", "how"]]
    for entry in results:
        memory = [number(size / 1e6, 2) for size in (entry.file, entry.weights, entry.plan)]
        start = [""] * 4
        if entry.start:
            sizes = entry.start.resident, entry.bound, entry.start.own
            start = [*(number(size / 1e6, 2) for size in sizes), number(entry.start.milliseconds, 1)]
        rows.append([entry.network, entry.target, *memory, *start, verdict(entry), entry.how])
    return markdown(rows)


def verdict(entry: Shipped) -> str:
    """How many steps are the same to the bit; nothing where none was run."""
    if not entry.is_same:
        return "" if entry.is_same is None else "no"
    return f"{entry.exact} of {entry.steps} steps" + ("" if entry.exact == entry.steps else ", outputs")


def main() -> None:
    """Ship each network in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=SUBJECTS, default=["demo", "mobilenet", "minilm"])
    parser.add_argument("--targets", nargs="+", metavar="NAME", default=["native", *CPUS, "cuda"])
    parser.add_argument("--zeros", type=float, default=ZEROS, metavar="SHARE", help="of 1x4 blocks")
    parser.add_argument("--no-emulation", dest="emulate", action="store_false", help="only compile CUDA kernels")
    parser.add_argument("--json", type=Path, default=Path("out/bench/shipping.json"))
    options = parser.parse_args()
    results: list[Shipped] = []
    with fresh_processes() as call:
        for network in options.networks:
            results += call(ship, network, options.targets, options.zeros, options.emulate)
            write_runs(options.json, "shipping", [asdict(entry) | {"bound": entry.bound} for entry in results])
    print(table(results))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
