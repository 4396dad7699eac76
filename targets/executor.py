"""Running a plan on this machine: compiled in memory for the passes that need numbers, or linked to be timed."""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path

import numpy as np

from pumice.loader import Library, Model
from pumice.targets.build import ENTRY, build
from pumice.targets.library import write_library
from pumice.targets.plan import Plan, aligned
from pumice.targets.target import Target


class Executor:
    """``inputs`` are filled, ``run`` is called, ``outputs`` are read; one caller at a time, on its own thread."""

    def __init__(self, plan: Plan, target: Target) -> None:
        """Compile ``plan`` in memory."""
        code = build(plan, target)
        self._run = code.module[ENTRY]
        self.inputs = [aligned(shape, dtype) for shape, dtype in plan.inputs]
        self.outputs = [aligned(shape, dtype) for shape, dtype in plan.outputs]
        self._memory = plan.weights, aligned((plan.workspace,), "uint8"), aligned((code.scratch,), "uint8")
        buffers = [*self._memory, *self.inputs, *self.outputs]
        self._table = np.array([buffer.ctypes.data for buffer in buffers], np.uint64)
        self._buffers = ctypes.c_void_p(self._table.ctypes.data)

    def run(self, first: int = 0, last: int = 2**31 - 1) -> None:
        """Run the steps from ``first`` up to but without ``last``."""
        self._run(self._buffers, first, last, 0, 1)


def build_executor(plan: Plan, target: Target) -> Executor:
    """Compile ``plan`` in memory, for this machine."""
    return Executor(plan, target)


def link_model(plan: Plan, target: Target, threads: int) -> Model:
    """``plan`` as it would ship, opened to run on ``threads`` threads; its file is gone when it has been mapped.

    Inputs and outputs are called ``input_0``, ``output_0``, and so on.
    """
    with tempfile.TemporaryDirectory(prefix="pumice-") as folder:
        path = Path(folder, "model.so")
        write_library(plan, target, plain_manifest(plan, target), path)
        return Model(Library(path), threads)


def plain_manifest(plan: Plan, target: Target) -> dict[str, object]:
    """The manifest of a plan of which no more is known than itself."""
    tensors = {
        f"{kind}s": [
            {"name": f"{kind}_{number}", "shape": list(shape), "dtype": dtype}
            for number, (shape, dtype) in enumerate(specs)
        ]
        for kind, specs in (("input", plan.inputs), ("output", plan.outputs))
    }
    wanted = {"name": target.name, "architecture": target.architecture, "features": sorted(target.features)}
    return {"target": wanted, **tensors, "layers": [], "versions": {}}
