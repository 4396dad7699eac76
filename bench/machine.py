"""What one machine can do at most: products a second, and bytes a second out of each level of its memory.

    python -m bench.machine [--threads 1 2] [--json out.json]

Small kernels of the same idioms as Pumice's own: a chain of products in registers (int8: what the instruction set's
``dot4`` is, and float32 multiply-adds), and a sum over a buffer of half the size of each cache, or of four times the
last one. Two operations for each multiply-add. These are the roofs of ``bench/plots.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from bench.kernel_model import KernelModel
from bench.processes import fresh_processes, write_runs
from bench.tables import markdown
from pumice.schedules import emit
from pumice.targets.isa import Isa, isa
from pumice.targets.target import Target

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_CACHES = {"L1": 32 << 10, "L2": 1 << 20, "L3": 16 << 20}
_STEPS = 100_000  # of the chain of products
_BYTES_READ = 64 << 20  # by each thread in one run of the sum
_REPEATS = 25
_STRIP = 16 * 64  # bytes added in one step of the sum


def main() -> None:
    """Print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--json", type=Path, default=Path("out/bench/machine.json"))
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with fresh_processes() as call:
        for threads in options.threads:
            runs.append(call(measure_machine, threads))
            write_runs(options.json, "machine", runs)
    rows = [["threads", *(f"{name}, GOP/s" for name in runs[0]["gops"]), *(f"{n}, GB/s" for n in runs[0]["gbytes"])]]
    for run in runs:
        values = [*run["gops"].values(), *run["gbytes"].values()]
        rows.append([str(run["threads"]), *(f"{value:.0f}" for value in values)])
    print(markdown(rows))


def measure_machine(threads: int) -> dict[str, Any]:
    """The roofs on so many threads: the best of some repeats, for a roof is what can be reached."""
    target = Target.parse("native")
    instructions = isa(target.isa)
    gops = {}
    for dtype in ("int8", "float32"):
        accumulators = instructions.registers * 3 // 8
        arrays = [np.ones((threads, instructions.lanes), "int32" if dtype == "int8" else "float32")] * 2
        seconds = _seconds(_products(instructions, dtype, accumulators, threads), target, arrays, threads)
        products = _STEPS * accumulators * instructions.lanes * (4 if dtype == "int8" else 1) * threads
        gops[dtype] = 2e-9 * products / seconds
    gbytes = {}
    for level, size in working_sets(cache_sizes()).items():
        rounds = max(1, _BYTES_READ // size)
        arrays = [np.ones((threads, count), np.int32) for count in (size // 4, instructions.lanes)]
        seconds = _seconds(_sum(instructions, size // 4, rounds, threads), target, arrays, threads)
        gbytes[level] = 1e-9 * size * rounds * threads / seconds
    return {"threads": threads, "gops": gops, "gbytes": gbytes}


def cache_sizes(folder: Path = _CACHES) -> dict[str, int]:
    """Bytes of the data cache of each level that one core can use; usual sizes where the system does not say."""
    sizes = {}
    for index in sorted(folder.glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            sizes[f"L{level}"] = int(size.rstrip("KM")) << (20 if size.endswith("M") else 10)
    return sizes or dict(_USUAL_CACHES)


def working_sets(caches: dict[str, int]) -> dict[str, int]:
    """How much is read of each level: half of a cache, and four times the last cache for the memory behind it.

    In whole strips of 16 vectors; no more than 256 MiB, which is past what a core gets of any cache.
    """
    last = list(caches.values())[-1]
    wanted = {level: size // 2 for level, size in caches.items()} | {"memory": 4 * last}
    return {level: min(size, 256 << 20) // _STRIP * _STRIP for level, size in wanted.items()}


def _products(instructions: Isa, dtype: str, accumulators: int, threads: int) -> tirx.PrimFunc:
    """Independent chains of products, as many as there are accumulators; the operands stay in registers."""
    lanes, kind = instructions.lanes, "int32" if dtype == "int8" else "float32"

    def body() -> None:
        x, y = emit.arguments(x=((threads, lanes), kind), y=((threads, lanes), kind))
        with emit.loop(threads, parallel=threads > 1) as thread:
            acc = T.alloc_buffer((accumulators * lanes,), kind, scope="global")
            operand = emit.load(x, thread * lanes, lanes)
            for a in range(accumulators):
                emit.store(acc, a * lanes, operand, lanes)
            with T.serial(0, _STEPS):
                for a in range(accumulators):
                    old = emit.load(acc, a * lanes, lanes)
                    new = (
                        instructions.dot4(old, operand, operand)
                        if dtype == "int8"
                        else emit.fma(operand, operand, old, lanes)
                    )
                    emit.store(acc, a * lanes, new, lanes)
            _store_sum(acc, accumulators, y, thread, lanes)

    return emit.kernel("kernel", body)


def _sum(instructions: Isa, words: int, rounds: int, threads: int) -> tirx.PrimFunc:
    """The sum of ``words`` int32, ``rounds`` times; each thread has its own."""
    lanes, unroll = instructions.lanes, _STRIP // 64

    def body() -> None:
        x, y = emit.arguments(x=((threads, words), "int32"), y=((threads, lanes), "int32"))
        with emit.loop(threads, parallel=threads > 1) as thread:
            acc = T.alloc_buffer((unroll * lanes,), "int32", scope="global")
            for u in range(unroll):
                emit.store(acc, u * lanes, emit.splat(0, lanes), lanes)
            with T.serial(0, rounds), T.serial(0, words // (unroll * lanes)) as i:
                for u in range(unroll):
                    at = thread * words + (i * unroll + u) * lanes
                    emit.store(acc, u * lanes, emit.load(acc, u * lanes, lanes) + emit.load(x, at, lanes), lanes)
            _store_sum(acc, unroll, y, thread, lanes)

    return emit.kernel("kernel", body)


def _store_sum(acc: Any, count: int, y: Any, thread: Any, lanes: int) -> None:
    """What nobody reads is not computed."""
    total = emit.load(acc, 0, lanes)
    for a in range(1, count):
        total = total + emit.load(acc, a * lanes, lanes)
    emit.store(y, thread * lanes, total, lanes)


def _seconds(function: tirx.PrimFunc, target: Target, arrays: Sequence[np.ndarray], threads: int) -> float:
    """The shortest time of a kernel."""
    with KernelModel(function, target, arrays, threads) as kernel:
        return min(kernel.seconds() for _ in range(_REPEATS))


if __name__ == "__main__":
    main()
