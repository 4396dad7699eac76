"""Which layers a GPU's tensor cores compute: from sm_80 on, by what the instructions do, since nothing was measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tvm import tirx

from pumice.passes.choose_kernel import Choice
from pumice.passes.layer_kernel import LayerKernel, LayerWork, gpu_kernel, per_channel
from pumice.schedules.blocks import Blocks, count_blocks
from pumice.schedules.cuda.mma import MmaLayer, mma_constants, mma_layer, on_tensor_cores
from pumice.targets.isa import Isa
from pumice.targets.target import Target

# How many times the multiply-adds of ``dp4a`` they do in the same time, at least, by NVIDIA's tables. What ``mma.sp``
# leaves out counts as done.
_DENSE, _TWO_OF_FOUR = 4, 8

# What a word of a list takes, as a multiple of what it takes dense: by the rows that share it (docs/cuda.md).
_LISTED = {1: 1.6, 2: 1.2, 4: 1.0}


def kernel_on_gpu(work: LayerWork, choice: Choice, weight: Blocks, target: Target) -> tuple[LayerKernel, Choice]:
    """The layer's kernel on a GPU, and the ``choice``, of ``weight``, as it is then: on tensor cores, or why not.

    Floats and single positions are nothing for them, and nothing is said of it.
    """
    if work.numbers.dtype == "int8" and not work.has_one_position:
        layer = on_tensor_cores(work.numbers.rows, work.source_rows, work.places, work.epilogue)
        if layer is None:
            why = "its taps lie too far apart for tensor cores"
        elif not target.has_tensor_cores:
            why = f"tensor cores are used from sm_80 on, and the target includes {target.gpus[0]}"
        elif (slower := _slower(layer, weight)) > 1:
            why = f"tensor cores would take {slower:.1f} times as long by NVIDIA's tables"
        else:
            return _on_tensor_cores(work, layer, choice)
        choice = replace(choice, reason=f"{choice.reason}; {why}")
    return gpu_kernel(work, weight), choice


def _times(layer: MmaLayer) -> int:
    return _TWO_OF_FOUR if layer.is_sparse else _DENSE


def _slower(layer: MmaLayer, weight: Blocks) -> float:
    """The time on tensor cores, which multiply all words and padding, over that of ``dp4a``."""
    listed = weight.work if weight.is_dense else weight.work * _LISTED[weight.shared]
    return layer.products / _times(layer) / max(listed, 1)


def _on_tensor_cores(work: LayerWork, layer: MmaLayer, choice: Choice) -> tuple[LayerKernel, Choice]:
    rows, missing = work.numbers.rows, layer.rows - len(work.numbers.bias)
    constants = mma_constants(rows, layer)
    kernel = LayerKernel(
        layer, _make, constants | per_channel(work.numbers, lambda values: np.pad(values, (0, missing)))
    )
    n, taps, _ = rows.shape
    left = f"{count_blocks(rows, 1) / (n * taps * layer.words):.0%} of its 1x4 blocks are left"
    if layer.is_sparse:
        left += ", none with more than two weights"
    return kernel, replace(
        choice,
        kernel=f"{'2:4' if layer.is_sparse else 'dense'} int8 tensor cores",
        reason=f"{left}, and tensor cores multiply {_times(layer)} times as many weights at once",
        stored=sum(array.nbytes for array in constants.values()),
    )


def _make(work: MmaLayer, isa: Isa, name: str) -> tirx.PrimFunc:
    return mma_layer(work, name)
