"""Measure what kernels cost on this machine: the numbers of ``schedules/costs.py``.

    python bench/kernel_costs.py [--isa vnni512 ...]

Kernels of shapes of ResNet-50 and BERT-base, dense and sparse at several densities and tilings, are timed on one
thread; the costs of ``schedules/costs.py`` are fitted to their times (least squares of the relative error, none
negative). One line is printed for each instruction set and data type, with the error that is left.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

os.environ.setdefault("TVM_NUM_THREADS", "1")

import numpy as np
import tvm
from scipy.optimize import nnls

from pumice.schedules.blocks import Blocks, dense_blocks, sparse_blocks
from pumice.schedules.convolution import Convolution, convolution, offsets
from pumice.schedules.costs import Costs, features
from pumice.schedules.epilogue import Epilogue
from pumice.schedules.gemv import Gemv, gemv
from pumice.schedules.geometry import Geometry, Window
from pumice.schedules.places import Places
from pumice.schedules.slices import Slices, slice_rows
from pumice.schedules.tiling import DENSE, Extent, Form, Tiling, tilings
from pumice.targets.isa import isa
from pumice.targets.target import Target

# output channels, input channels, height, width, kernel
SHAPES = [
    (256, 64, 56, 56, 1),
    (64, 64, 56, 56, 3),
    (128, 128, 28, 28, 3),
    (1024, 256, 14, 14, 1),
    (256, 1024, 14, 14, 1),
    (512, 512, 7, 7, 3),
    (768, 768, 1, 128, 1),
    (768, 3072, 1, 128, 1),
]
FORMS = [(DENSE, 1.0), (Form(1), 0.1), (Form(1), 0.4), (Form(2), 0.2), (Form(2), 0.7), (Form(4), 0.3), (Form(4), 0.7)]
TARGETS = {"vnni512": "x86-64-v4-vnni", "avx512bw": "x86-64-v4", "avxvnni": "x86-64-v3-avxvnni", "avx2": "x86-64-v3"}
ROUNDS = 7
MASKS = 8  # different weights of a sparse kernel


def main() -> None:
    """Print one line for each instruction set and data type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", nargs="+", default=[*TARGETS, "portable"], choices=[*TARGETS, "portable"])
    args = parser.parse_args()
    for name in args.isa:
        for dtype in ("int8", "float32"):
            costs, error = fit(name, dtype)
            numbers = ", ".join(f"{value:.4f}" for value in vars(costs).values())
            print(f'("{name}", "{dtype}"): Costs({numbers}),  # root mean square error {error:.0%}', flush=True)


def fit(name: str, dtype: str) -> tuple[Costs, float]:
    """The costs for an instruction set, and the relative error of the times that they give."""
    samples = list(_samples(name, dtype))
    counts = np.array([list(count.values()) for count, _ in samples])
    times = np.array([time for _, time in samples])
    values, _ = nnls(counts / times[:, None], np.ones(len(times)))
    error = float(np.sqrt(np.mean((counts @ values / times - 1) ** 2)))
    return Costs(**dict(zip(samples[0][0], map(float, values), strict=True)), **_gemv_costs(name, dtype)), error


def _samples(name: str, dtype: str) -> Iterator[tuple[dict[str, float], float]]:
    """What each kernel does, and its nanoseconds: the least of some rounds."""
    rng = np.random.default_rng(0)
    for n, c, height, width, k in SHAPES:
        window = Window((k, k), padding=(k // 2, k // 2))
        geometry = Geometry(1, height, width, *window.reach((height, width), (height, width)))
        places = Places(window, geometry, geometry)
        for form, density in FORMS:
            masks = 1 if form.is_dense else MASKS
            dense = _random(rng, (n, k * k, c), dtype)
            weights = [_thin(rng, dense, density, form.shared) for _ in range(masks)]
            extent = Extent.of(dense, places, isa(name))
            found = [dense_blocks(w) if form.is_dense else sparse_blocks(w, form.shared) for w in weights]
            entries = int(np.mean([len(blocks.data) for blocks in found]))
            for tiling in tilings(extent, form, isa(name), 1):
                run = _convolution([blocks.tiled(tiling.words) for blocks in found], places, tiling, name)
                yield features(extent, form, entries, tiling), min(run() for _ in range(ROUNDS)) * 1e9


def _gemv_costs(name: str, dtype: str) -> dict[str, float]:
    """Nanoseconds an entry of the kernel for one position."""
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {"gemv_dense": [], "gemv_sparse": []}
    for n, words in ((2048, 512), (1024, 256)):  # no larger than the caches: from memory every form waits
        rows = _random(rng, (n, 1, words * (4 if dtype == "int8" else 1)), dtype)
        for key, weight in (("gemv_dense", rows), ("gemv_sparse", _thin(rng, rows, 0.1, 1))):
            slices = slice_rows(weight, isa(name), key == "gemv_sparse")
            run = _gemv(slices, n, name, dtype)
            times[key].append(min(run() for _ in range(ROUNDS)) * 1e9 / slices.work)
    return {key: float(np.median(values)) for key, values in times.items()}


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.integers(1, 128, shape).astype(dtype)


def _thin(rng: np.random.Generator, rows: np.ndarray, density: float, shared: int) -> np.ndarray:
    """Keep this share of the 1x4 blocks (1x1 for float32), ``shared`` output rows alike."""
    depth = 4 if rows.dtype == np.int8 else 1
    n, taps, c = rows.shape
    keep = rng.random((n // shared, 1, taps, c // depth, 1)) < density
    return (rows.reshape(n // shared, shared, taps, c // depth, depth) * keep).reshape(rows.shape).astype(rows.dtype)


def _convolution(weights: list[Blocks], places: Places, tiling: Tiling, name: str) -> Callable[[], float]:
    """One kernel and several weights, which take turns."""
    first, most = weights[0], max(len(blocks.data) for blocks in weights)
    depth = first.data.shape[2]
    packed = "uint8" if depth == 4 else "float32"
    epilogue = Epilogue(packed, fits=True) if depth == 4 else Epilogue(packed, low=float("-inf"), high=float("inf"))
    work = Convolution.of(first, first.words, places, tiling, epilogue)
    work = work if first.is_dense else replace(work, blocks=most, columns=most)
    positions = places.target.positions
    ends = [np.zeros(first.rows, "int32" if depth == 4 else "float32")]
    ends += [np.zeros(first.rows, "float32")] if depth == 4 else []
    ends += [places.target.mask] if places.target.is_padded else []
    ends += [np.zeros((first.rows // depth, positions, depth), packed)]
    calls = []
    for blocks in weights:
        arrays = [np.resize(blocks.data, (work.blocks, *blocks.data.shape[1:]))]
        arrays += [np.resize(offsets(blocks, places), (work.columns,))]
        arrays += [] if blocks.starts is None else [blocks.starts]
        calls.append([np.zeros((first.words, positions, depth), packed), *arrays, *ends])
    return _compiled(convolution(work, isa(name), "kernel"), calls, name)


def _gemv(slices: Slices, rows: int, name: str, dtype: str) -> Callable[[], float]:
    depth, packed = (4, "uint8") if dtype == "int8" else (1, "float32")
    work = Gemv(dtype, slices.words, rows, slices.work, slices.is_dense, Epilogue(packed))
    arrays = [np.zeros((slices.words, 1, depth), packed), slices.data]
    arrays += [] if slices.lists is None else slices.lists.arrays.values()
    arrays += [np.zeros(rows, "int32" if depth == 4 else "float32")]
    arrays += [np.zeros(rows, "float32")] if depth == 4 else []
    arrays += [np.zeros((rows // depth, 1, depth), packed)]
    return _compiled(gemv(work, isa(name), "kernel"), [arrays], name)


def _compiled(kernel: tvm.tirx.PrimFunc, calls: list[list[np.ndarray]], name: str) -> Callable[[], float]:
    target = Target.parse(TARGETS.get(name, "x86-64-v2"))
    library = tvm.compile(tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")}), target=target.tvm)
    arguments = [[tvm.runtime.tensor(array) for array in arrays] for arrays in calls]
    # Timed inside the runtime: a call from Python costs as much as a small kernel. And once each in turn: a CPU learns
    # the lengths of a few thousand lists by heart, which it never could in a network.
    evaluate = library.mod.time_evaluator("kernel", tvm.cpu(), number=1 if len(calls) > 1 else 3, repeat=1)
    return lambda: float(np.mean([evaluate(*each).mean for each in arguments]))


if __name__ == "__main__":
    main()
