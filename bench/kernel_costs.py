"""Measure what each form of a layer costs on this machine: the numbers of ``schedules/costs.py``.

    python bench/kernel_costs.py [--isa vnni512 ...]

For shapes of ResNet-50 and BERT-base at several densities it times the dense, 1x4 and 4x4 kernels on one thread,
interleaved, and prints the median nanoseconds of one vector product in each form, and the density of 1x4 blocks
below which sparse pays.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

os.environ.setdefault("TVM_NUM_THREADS", "1")

import numpy as np
import tvm

from pumice.schedules.blocks import Blocks, dense_blocks, sparse_blocks
from pumice.schedules.convolution import Convolution, convolution, offsets
from pumice.schedules.epilogue import Epilogue
from pumice.schedules.gemv import Gemv, Slices, gemv, slice_rows
from pumice.schedules.geometry import Geometry, Window
from pumice.targets.isa import isa
from pumice.targets.target import Target

# output channels, input channels, height, width, kernel
SHAPES = [
    (256, 64, 56, 56, 1),
    (128, 128, 28, 28, 3),
    (1024, 256, 14, 14, 1),
    (512, 512, 7, 7, 3),
    (768, 768, 1, 128, 1),
]
DENSITIES = (0.1, 0.3)
TARGETS = {"vnni512": "x86-64-v4-vnni", "avx512bw": "x86-64-v4", "avxvnni": "x86-64-v3-avxvnni", "avx2": "x86-64-v3"}


def main() -> None:
    """Print one line for each instruction set and data type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", nargs="+", default=list(TARGETS), choices=[*TARGETS, "portable"])
    args = parser.parse_args()
    for name in args.isa:
        for dtype in ("int8", "float32"):
            costs = measure(name, dtype)
            numbers = ", ".join(f"{value:.3f}" for value in costs)
            pays = costs[0] / costs[1]
            print(f'("{name}", "{dtype}"): Costs({numbers}),  # sparse pays below {pays:.0%} of blocks', flush=True)


def measure(name: str, dtype: str) -> list[float]:
    """Medians over shapes of ns a vector product: dense, sparse, shared, gemv dense, gemv sparse."""
    rng = np.random.default_rng(0)
    runs: dict[str, list[tuple[Callable[[], float], float]]] = {form: [] for form in ("dense", "1", "4", "gd", "gs")}
    for n, c, height, width, k in SHAPES:
        window = Window((k, k), padding=(k // 2, k // 2))
        geometry = Geometry(1, height, width, *window.reach((height, width), (height, width)))
        rows = _random(rng, (n, k * k, c), dtype)
        runs["dense"].append(_convolution(dense_blocks(rows), window, geometry, name, dtype))
        for density in DENSITIES:
            for shared in (1, 4):
                sparse = sparse_blocks(_thin(rng, rows, density, shared), shared)
                runs[str(shared)].append(_convolution(sparse, window, geometry, name, dtype))
    for n, c in ((4096, 4096), (1024, 1024)):
        rows = _random(rng, (n, 1, c), dtype)
        lanes = isa(name).lanes
        runs["gd"].append(_gemv(slice_rows(rows, lanes, False), n, name, dtype))
        runs["gs"].append(_gemv(slice_rows(_thin(rng, rows, 0.1, 1), lanes, True), n, name, dtype))
    return [float(np.median(times)) for times in _time(runs).values()]


def _time(runs: dict[str, list[tuple[Callable[[], float], float]]], rounds: int = 15) -> dict[str, list[float]]:
    """Interleaved: every kernel once a round; the median of the rounds in ns, divided by its vector products."""
    seconds: dict[str, list[list[float]]] = {form: [[] for _ in kernels] for form, kernels in runs.items()}
    for _ in range(rounds):
        for form, kernels in runs.items():
            for i, (run, _work) in enumerate(kernels):
                seconds[form][i].append(run())
    return {
        form: [float(np.median(s)) * 1e9 / work for s, (_, work) in zip(seconds[form], kernels, strict=True)]
        for form, kernels in runs.items()
    }


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.integers(-127, 128, shape).astype(dtype)


def _thin(rng: np.random.Generator, rows: np.ndarray, density: float, shared: int) -> np.ndarray:
    """Keep this share of the 1x4 blocks (1x1 for float32), ``shared`` output rows alike."""
    depth = 4 if rows.dtype == np.int8 else 1
    n, taps, c = rows.shape
    keep = rng.random((n // shared, 1, taps, c // depth, 1)) < density
    return (rows.reshape(n // shared, shared, taps, c // depth, depth) * keep).reshape(rows.shape).astype(rows.dtype)


def _convolution(
    blocks: Blocks, window: Window, geometry: Geometry, name: str, dtype: str
) -> tuple[Callable[[], float], float]:
    depth, packed = (4, "uint8") if dtype == "int8" else (1, "float32")
    places = offsets(blocks, window, geometry, geometry)
    work = Convolution(
        dtype, blocks.words, blocks.rows, geometry, geometry, len(blocks.data), len(places), blocks.shared,
        blocks.is_dense, Epilogue(packed),
    )  # fmt: skip
    arrays = [np.zeros((blocks.words, geometry.positions, depth), packed), blocks.data, places]
    arrays += [] if blocks.starts is None else [blocks.starts]
    arrays += [np.zeros(blocks.rows, "int32" if depth == 4 else "float32")]
    arrays += [np.zeros(blocks.rows, "float32")] if depth == 4 else []
    arrays += [geometry.mask] if geometry.is_padded else []
    arrays += [np.zeros((blocks.rows // depth, geometry.positions, depth), packed)]
    vectors = -(-geometry.span // isa(name).lanes)
    return _compiled(convolution(work, isa(name), "kernel"), arrays, name), blocks.work * vectors


def _gemv(slices: Slices, rows: int, name: str, dtype: str) -> tuple[Callable[[], float], float]:
    depth, packed = (4, "uint8") if dtype == "int8" else (1, "float32")
    work = Gemv(dtype, slices.words, rows, slices.work, slices.starts is None, Epilogue(packed))
    arrays = [np.zeros((slices.words, 1, depth), packed), slices.data]
    arrays += [] if slices.columns is None or slices.starts is None else [slices.columns, slices.starts]
    arrays += [np.zeros(rows, "int32" if depth == 4 else "float32")]
    arrays += [np.zeros(rows, "float32")] if depth == 4 else []
    arrays += [np.zeros((rows // depth, 1, depth), packed)]
    return _compiled(gemv(work, isa(name), "kernel"), arrays, name), slices.work


def _compiled(kernel: tvm.tirx.PrimFunc, arrays: list[np.ndarray], name: str) -> Callable[[], float]:
    target = Target.parse(TARGETS.get(name, "x86-64-v2"))
    library = tvm.compile(tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")}), target=target.tvm)
    arguments = [tvm.runtime.tensor(array) for array in arrays]
    # Timed inside the runtime: a call from Python costs as much as a small kernel.
    evaluate = library.mod.time_evaluator("kernel", tvm.cpu(), number=5, repeat=1)
    return lambda: float(evaluate(*arguments).mean)


if __name__ == "__main__":
    main()
