"""What a compiled model runs: its steps in order, and where each argument of each step lies.

Everything is decided at compile time. Five kinds of buffers hold all data: the weights, one workspace for what is
computed on the way, scratch for what a kernel needs while it runs, the inputs and the outputs. A step calls one kernel
with views of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx

ALIGNMENT = 64  # bytes: of weights, workspace and scratch and every view of them, which the kernels rely on

# Buffers go by number: these three, then the inputs, then the outputs.
WEIGHTS = 0
WORKSPACE = 1
SCRATCH = 2
FIRST_INPUT = 3

Spec = tuple[tuple[int, ...], str]  # of an input or output: shape and data type


@dataclass(frozen=True)
class View:
    """An argument of a step: so many bytes into a buffer."""

    buffer: int
    offset: int = 0


@dataclass(frozen=True)
class Step:
    """One call of a kernel. ``layer`` is the layer that it computes, empty for what runs between layers.

    ``outputs`` are the bytes of each result; results are the last arguments.
    """

    kernel: str
    arguments: tuple[View, ...]
    layer: str = ""
    outputs: tuple[int, ...] = ()

    @property
    def results(self) -> tuple[View, ...]:
        """Where the results lie."""
        return self.arguments[len(self.arguments) - len(self.outputs) :]

    def to_json(self) -> dict[str, Any]:
        """As the manifest keeps it."""
        return {"kernel": self.kernel, "layer": self.layer, "outputs": list(self.outputs)}


@dataclass(frozen=True)
class Plan:
    """A model ready for code generation.

    kernels: the PrimFuncs by name
    steps: in order
    weights: uint8, aligned, all weights at their offsets; equal ones are there once
    workspace: bytes of the workspace: the peak of what lives at once
    inputs, outputs: shapes and data types
    """

    kernels: Mapping[str, tirx.PrimFunc]
    steps: tuple[Step, ...]
    weights: np.ndarray
    workspace: int
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]


def align(size: int) -> int:
    """``size`` rounded up to what buffers are aligned to."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def aligned(shape: Sequence[int], dtype: str) -> np.ndarray:
    """An array of which nothing is known but that it lies as the kernels want it; NumPy's own has 16 bytes."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(tuple(shape))
