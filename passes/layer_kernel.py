"""A layer between fusion and its kernel: what is computed, before and after a form of its weight is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tvm import tirx

from pumice.schedules.blocks import QUAD, Blocks, count_blocks, dense_blocks, has_lowest_pairs, sparse_blocks
from pumice.schedules.convolution import Convolution, convolution, offsets, row_order
from pumice.schedules.cuda.kernel import cuda_layer
from pumice.schedules.cuda.layer import CudaLayer, cuda_constants
from pumice.schedules.cuda.mma import MmaLayer
from pumice.schedules.cuda.tiling import tilings as cuda_tilings
from pumice.schedules.epilogue import Epilogue
from pumice.schedules.gemv import Gemv, gemv, has_few_positions
from pumice.schedules.measurements import Workload
from pumice.schedules.places import Places
from pumice.schedules.slices import Slices, slice_rows
from pumice.schedules.tiling import FORMS, Candidate, Tiling
from pumice.targets.isa import Isa


@dataclass(frozen=True, eq=False)
class Numbers:
    """The layer's numbers as its kernel takes them, for each output channel.

    rows: int8 or float32 ``[N, taps, C]``, groups expanded
    bias: int32 or float32 ``[N]``; multiplier: float32 ``[N]``, None for float32
    """

    rows: np.ndarray
    bias: np.ndarray
    multiplier: np.ndarray | None

    @property
    def dtype(self) -> str:
        """The data type of the multiplication."""
        return str(self.rows.dtype)


@dataclass(frozen=True, eq=False)
class LayerWork:
    """All that a kernel of the layer has to know, whatever form its weight takes.

    ``source_rows`` are the rows of the packed input, channel words times stride phases.
    """

    name: str
    numbers: Numbers
    places: Places
    source_rows: int
    epilogue: Epilogue
    threads: int

    @property
    def depth(self) -> int:
        """Input channels in a word."""
        return 4 if self.numbers.dtype == "int8" else 1

    @property
    def has_few_positions(self) -> bool:
        """Whether its weight can be kept in slices."""
        return has_few_positions(self.places)

    @property
    def has_one_position(self) -> bool:
        """Whether there is nothing to broadcast a weight against, and it must be."""
        return self.has_few_positions and self.places.target.span == 1

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """Of the packed output."""
        rows, positions = -(-len(self.numbers.rows) // QUAD) * QUAD, self.places.target.positions
        return (rows // QUAD, positions, QUAD) if self.epilogue.output == "uint8" else (rows, positions, 1)

    @cached_property
    def workload(self) -> Workload:
        """What measured times are kept for: neither names nor scales."""
        n, taps, c = self.numbers.rows.shape
        window, epilogue = self.places.window, self.epilogue
        geometries = [
            f"{g.batch}x{g.height}x{g.width}+{g.pad_h}x{g.pad_w}" for g in (self.places.source, self.places.target)
        ]
        axes = (window.kernel, window.stride, window.dilation, window.padding)
        parts = [self.numbers.dtype, f"{n}x{taps}x{c}", "window " + " ".join(f"{h}x{w}" for h, w in axes)]
        parts += [f"from {geometries[0]} to {geometries[1]}", epilogue.output]
        parts += [epilogue.activation or "plain", *(["residual"] if epilogue.residual else [])]
        total = n * taps * -(-c // self.depth)
        shares = (1,) if self.has_one_position else tuple(form.shared for form in FORMS if not form.is_dense)
        left = tuple(round(count_blocks(self.numbers.rows, s) * s / total, 4) for s in shares)
        return Workload(", ".join(parts), left)


@dataclass(frozen=True)
class LayerKernel:
    """A kernel: ``make(work, isa, name)`` emits it. ``constants`` are its arguments between the input and the residual.

    After the residual comes the mask of the output's plane, if that is padded.
    """

    work: Convolution | Gemv | CudaLayer | MmaLayer
    make: Callable[[Any, Isa, str], tirx.PrimFunc]
    constants: dict[str, np.ndarray]


def weight_in(rows: np.ndarray, candidate: Candidate, isa: Isa, places: Places) -> Blocks | Slices:
    """``rows`` ``[N, taps, C]`` in a form."""
    form, tiling = candidate
    if tiling is None:
        return slice_rows(rows, isa, not form.is_dense, places.target.span)
    if form.is_dense:
        return dense_blocks(rows).tiled(tiling.words)
    blocks = sparse_blocks(rows, form.shared)
    orders = isa.orders_rows and form.shared == 1  # lists of several rows are few, and to jump between these costs more
    return (blocks.ordered(tiling.rows // QUAD) if orders else blocks).tiled(tiling.words)


def layer_kernel(work: LayerWork, weight: Blocks | Slices, tiling: Tiling | None) -> LayerKernel:
    """The kernel of a layer whose weight is in slices, or in blocks that were cut for ``tiling``."""
    numbers = work.numbers
    if isinstance(weight, Slices):
        rows = -(-len(numbers.rows) // QUAD) * QUAD
        few = Gemv(
            dtype=numbers.dtype,
            words=weight.words,
            rows=rows,
            count=weight.work,
            is_dense=weight.is_dense,
            epilogue=work.epilogue,
            threads=work.threads,
            positions=work.places.target.span,
            has_lowest_pairs=has_lowest_pairs(weight.data),
        )
        constants = {"blocks": weight.data} | (weight.lists.arrays if weight.lists else {})
        return LayerKernel(few, gemv, constants | per_channel(numbers, weight.per_row))
    assert tiling is not None
    many = Convolution.of(weight, work.source_rows, work.places, tiling, work.epilogue, work.threads)
    constants = {"blocks": weight.data, "offsets": offsets(weight, work.places)}
    constants |= {} if weight.starts is None else {"starts": weight.starts}
    constants |= {} if weight.order is None else {"order": row_order(weight.order)}
    order = np.arange(weight.rows) if weight.order is None else weight.order
    missing = weight.rows - len(numbers.bias)
    return LayerKernel(
        many, convolution, constants | per_channel(numbers, lambda values: np.pad(values, (0, missing))[order])
    )


def gpu_kernel(work: LayerWork, weight: Blocks) -> LayerKernel:
    """The kernel of a layer on a GPU, which cuts the ``weight``, of a single tile, as it needs it.

    Raises UnsupportedError where no tile of the reduction is small enough for a GPU's shared memory.
    """
    for tiling in cuda_tilings(weight, work.places):
        tiled = weight.tiled(tiling.words)
        layer = CudaLayer.of(tiled, work.source_rows, work.places, tiling, work.epilogue)
        if layer.fits:
            break
    missing = weight.rows - len(work.numbers.bias)
    constants = cuda_constants(tiled, layer) | per_channel(work.numbers, lambda values: np.pad(values, (0, missing)))
    return LayerKernel(layer, _on_gpu, constants)


def _on_gpu(work: CudaLayer, isa: Isa, name: str) -> tirx.PrimFunc:
    return cuda_layer(work, name)


def per_channel(numbers: Numbers, arrange: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    """Bias and multiplier, each as ``arrange`` makes it."""
    found = {"bias_packed": arrange(numbers.bias)}
    return found if numbers.multiplier is None else found | {"multiplier": arrange(numbers.multiplier)}
