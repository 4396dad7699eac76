"""Running a plan on this machine: the code with buffers of its own, which the caller fills and reads."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tvm

from pumice.targets.build import ENTRY, build
from pumice.targets.library import WEIGHTS_SYMBOL
from pumice.targets.plan import Plan, Spec, aligned
from pumice.targets.target import Target


class Executor:
    """``inputs`` are filled, ``run`` is called, ``outputs`` are read; one caller at a time.

    Args:
        module: what ``build`` made, or a library that was loaded.
        weights: an array that begins where the weights do; it is not copied.
        workspace, scratch: bytes that the plan and its kernels want.
        inputs, outputs: shapes and data types.
    """

    def __init__(
        self,
        module: tvm.runtime.Module,
        weights: np.ndarray,
        workspace: int,
        scratch: int,
        inputs: Iterable[Spec],
        outputs: Iterable[Spec],
    ) -> None:
        self._run = module[ENTRY]
        self.inputs = [aligned(shape, dtype) for shape, dtype in inputs]
        self.outputs = [aligned(shape, dtype) for shape, dtype in outputs]
        self._memory = weights, aligned((workspace,), "uint8"), aligned((scratch,), "uint8")
        buffers = [*self._memory, *self.inputs, *self.outputs]
        self._table = np.array([buffer.ctypes.data for buffer in buffers], np.uint64)
        self._buffers = ctypes.c_void_p(self._table.ctypes.data)

    def run(self, first: int = 0, last: int = 2**31 - 1) -> None:
        """Run the steps from ``first`` up to but without ``last``."""
        self._run(self._buffers, first, last, 0, 1)


def build_executor(plan: Plan, target: Target) -> Executor:
    """Compile ``plan`` in memory, for this machine."""
    code = build(plan, target)
    return Executor(code.module, plan.weights, plan.workspace, code.scratch, plan.inputs, plan.outputs)


def load_library(path: Path, workspace: int, scratch: int, inputs: Iterable[Spec], outputs: Iterable[Spec]) -> Executor:
    """The executor of a library; its weights stay where the loader mapped them."""
    name = str(path.resolve())  # dlopen searches the system's folders for a name without a slash
    module = tvm.runtime.load_module(name)
    weights = np.ctypeslib.as_array((ctypes.c_uint8 * 1).in_dll(ctypes.CDLL(name), WEIGHTS_SYMBOL))
    return Executor(module, weights, workspace, scratch, inputs, outputs)
