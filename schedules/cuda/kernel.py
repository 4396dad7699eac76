"""The kernel of a layer on a GPU."""

from __future__ import annotations

from tvm import tirx

from pumice.schedules import emit
from pumice.schedules.cuda.convolution import ConvolutionEmitter
from pumice.schedules.cuda.gemv import GemvEmitter
from pumice.schedules.cuda.layer import CudaLayer


def cuda_layer(work: CudaLayer, name: str = "layer") -> tirx.PrimFunc:
    """The PrimFunc of ``work``, for ``targets/cuda_source.py``."""
    emitter = GemvEmitter(work) if work.has_one_position else ConvolutionEmitter(work)
    return emit.kernel(name, emitter.emit)
