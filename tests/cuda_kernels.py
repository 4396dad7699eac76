"""Drive CUDA kernels on this CPU: many layers go through one compiler run, for that is what takes the time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from kernels import (
    blocks_of,
    garbage,
    geometry_for,
    is_padding,
    output_size,
    packed_of,
    padded,
    phases_of,
    unpacked,
)

from pumice.errors import MissingDependencyError
from pumice.schedules.cuda.kernel import cuda_layer
from pumice.schedules.cuda.layer import CudaLayer, cuda_constants
from pumice.schedules.cuda.tiling import Tiling, tilings
from pumice.schedules.epilogue import Epilogue
from pumice.schedules.geometry import Geometry, Window
from pumice.schedules.places import Places
from pumice.targets.cuda_emulation import Emulation
from pumice.targets.cuda_source import cuda_source


@dataclass(eq=False, repr=False)
class Case:
    """A layer with its numbers: NCHW ``x``, OIHW ``weight``. ``tiling``: None for the first of ``tilings``."""

    x: np.ndarray
    weight: np.ndarray
    window: Window = Window((1, 1))  # noqa: RUF009
    form: str = "dense"
    groups: int = 1
    zx: int = 0
    bias: np.ndarray | None = None
    m: np.ndarray | None = None
    epilogue: Epilogue = field(default_factory=Epilogue)
    residual: np.ndarray | None = None
    after: tuple[int, int] | None = None
    tiling: Tiling | None = None

    def prepare(self) -> None:
        """The workload and its arrays."""
        x, n = self.x, len(self.weight)
        out_shape = (x.shape[0], n, *output_size(x.shape[2:], self.window, self.after))
        self.target = geometry_for(x.shape, out_shape, self.window)
        if self.target.span == 1 and not self.target.is_padded:
            self.target = Geometry.of_tokens(1)
        source = phases_of(x, self.target, self.window, self.zx if x.dtype == np.uint8 else 0.0)
        blocks = blocks_of(self.weight, self.groups, self.form)
        places = Places(self.window, self.target, self.target)
        tiling = self.tiling or tilings(blocks, places)[0]
        blocks = blocks if self.target.positions == 1 else blocks.tiled(tiling.words)
        self.work = CudaLayer.of(blocks, source.shape[0], places, tiling, self.epilogue)
        is_int8 = x.dtype == np.uint8
        zero = np.zeros(n, np.int32 if is_int8 else np.float32)
        self.arrays: list[np.ndarray] = [source, *cuda_constants(blocks, self.work).values()]
        self.arrays.append(padded(zero if self.bias is None else self.bias, blocks.rows))
        self.arrays += [padded(self.m, blocks.rows)] if is_int8 and self.m is not None else []
        if self.residual is not None:
            self.arrays.append(packed_of(self.residual, self.target, 99 if self.residual.dtype == np.uint8 else 9.9))
        self.arrays += [np.where(is_padding(self.target), 0, -1).astype(np.int32)] if self.target.is_padded else []
        packed = self.epilogue.output == "uint8"
        shape = (blocks.rows // 4, self.target.positions, 4) if packed else (blocks.rows, self.target.positions, 1)
        self.arrays.append(garbage(shape, self.epilogue.output))


def run_cases(cases: list[Case]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each case the result as NCHW and what lies in its padding; the threads' order changes nothing."""
    for case in cases:
        case.prepare()
    functions = {f"layer{i}": cuda_layer(case.work, f"layer{i}") for i, case in enumerate(cases)}
    emulation = emulate(functions)
    return [run_both_ways(emulation, name, case) for name, case in zip(functions, cases, strict=True)]


def run_both_ways(emulation: Emulation, name: str, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """One case, its threads in order and in reverse order."""
    first, second = ([array.copy() for array in case.arrays] for _ in range(2))
    emulation.run(name, *first)
    emulation.run(name, *second, is_reversed=True)
    y = first[-1]
    np.testing.assert_array_equal(second[-1], y)
    for before, after in zip(case.arrays[:-1], first[:-1], strict=True):
        np.testing.assert_array_equal(after, before)
    padding = is_padding(case.target)
    return unpacked(y, case.target, len(case.weight)), y[:, padding] if case.target.is_padded else y[:0]


def emulate(functions: dict[str, Any]) -> Emulation:
    """The kernels of ``functions`` on this CPU; skips the test where that cannot be."""
    try:
        return Emulation(cuda_source(functions))
    except MissingDependencyError as error:
        pytest.skip(str(error))
