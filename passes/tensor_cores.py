"""Which layers a GPU's tensor cores compute: from sm_80 on, by what the instructions do, since nothing was measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tvm import tirx

from pumice.passes.choose_kernel import Choice
from pumice.passes.layer_kernel import LayerKernel, LayerWork, per_channel
from pumice.schedules.blocks import Blocks
from pumice.schedules.cuda.mma import MmaLayer, mma_layer, on_tensor_cores
from pumice.targets.isa import Isa

# How many times the multiply-adds of ``dp4a`` they do in the same time, by NVIDIA's tables: at least, and where two of
# four weights are left.
_DENSE, _TWO_OF_FOUR = 4, 8

# What a word of a list takes, as a multiple of what it takes dense: by the rows that share it (docs/cuda.md).
_LISTED = {1: 1.6, 2: 1.2, 4: 1.0}


def tensor_core_kernel(work: LayerWork, choice: Choice) -> tuple[LayerKernel, Choice] | None:
    """The kernel on tensor cores, and the ``choice`` as it is then; None where lists of blocks have less to do.

    Also None for what tensor cores do not take: floats, single positions, and taps that lie too far apart.
    """
    if work.numbers.dtype != "int8" or work.has_one_position or not isinstance(choice.weight, Blocks):
        return None
    found = on_tensor_cores(work.numbers.rows, work.source_rows, work.places, work.epilogue)
    if found is None:
        return None
    layer, constants = found
    times = _TWO_OF_FOUR if layer.is_sparse else _DENSE
    weight = choice.weight
    left = weight.work / (weight.rows * weight.taps * weight.words)
    if not weight.is_dense and left * _LISTED[weight.shared] < 1 / times:
        return None
    missing = layer.rows - len(work.numbers.bias)
    kernel = LayerKernel(
        layer, _make, constants | per_channel(work.numbers, lambda values: np.pad(values, (0, missing)))
    )
    form = "2:4" if layer.is_sparse else "dense"
    reason = f"{left:.0%} of its words are left, and tensor cores multiply {times} times as many weights at once"
    stored = sum(array.nbytes for array in constants.values())
    return kernel, replace(choice, kernel=f"{form} int8 tensor cores", reason=reason, stored=stored)


def _make(work: MmaLayer, isa: Isa, name: str) -> tirx.PrimFunc:
    return mma_layer(work, name)
