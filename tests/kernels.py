"""Drive single kernels: compile one PrimFunc for an instruction set, lay arrays out as it wants them, read them back.

The layouts are written down a second time here, in plain numpy, so that a test says what a kernel must do without
asking the code under test. Outputs are handed over full of garbage, so that what a kernel forgets shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import arm
import numpy as np
import pytest
import tvm

from pumice.schedules.blocks import Blocks, dense_blocks, expand_groups, has_lowest_pairs, sparse_blocks
from pumice.schedules.convolution import Convolution, convolution, offsets, row_order
from pumice.schedules.epilogue import Epilogue
from pumice.schedules.gemv import Gemv, gemv
from pumice.schedules.geometry import Geometry, Window
from pumice.schedules.places import Places
from pumice.schedules.slices import slice_rows
from pumice.schedules.tiling import DENSE, Extent, Form, Tiling, tilings
from pumice.targets.detect import host_features
from pumice.targets.isa import isa
from pumice.targets.target import Target

TARGETS = {
    "vnni512": "x86-64-v4-vnni",
    "avx512bw": "x86-64-v4",
    "avxvnni": "x86-64-v3-avxvnni",
    "avx2": "x86-64-v3",
    "portable": "x86-64",
}


def missing_features(name: str) -> frozenset[str]:
    """What this machine lacks to run kernels for the instruction set ``name``."""
    return Target.parse(TARGETS[name]).features - host_features()


RUNNABLE = [name for name in TARGETS if not missing_features(name)]
ALL_ISAS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            bool(missing_features(name)), reason=f"this CPU lacks {', '.join(sorted(missing_features(name)))}"
        ),
    )
    for name in TARGETS
]


def garbage(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """What an output holds before the kernel runs."""
    return np.full(shape, 0xA7, np.uint8) if dtype == "uint8" else np.full(shape, -7.7e4, dtype)


def run_kernel(function: tvm.tirx.PrimFunc, isa_name: str, *arrays: np.ndarray) -> np.ndarray:
    """Compile ``function`` and call it; the last array is the output, and is returned."""
    return run_kernel_for(function, isa_name, *arrays, outputs=1)[0]


def run_kernel_for(function: tvm.tirx.PrimFunc, isa_name: str, *arrays: np.ndarray, outputs: int) -> list[np.ndarray]:
    """The same for a kernel whose last ``outputs`` arrays are outputs; packed bytes are turned where they must be."""
    turned = _turned(isa_name, function, arrays)
    if isa_name in arm.TARGETS:
        results = arm.run_kernel_for(function, isa_name, *turned, outputs=outputs)
        return _turned(isa_name, function, results)
    named = function.with_attr("global_symbol", "kernel")
    library = tvm.compile(tvm.IRModule({"kernel": named}), target=Target.parse(TARGETS[isa_name]).tvm)
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in turned]
    library["kernel"](*tensors)
    return _turned(isa_name, function, [tensor.numpy() for tensor in tensors[-outputs:]])


def _turned(isa_name: str, function: tvm.tirx.PrimFunc, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``x ^ 0x80`` of each array of packed bytes, where ``sdot`` and the like want them so."""
    sign, names = isa(isa_name).sign, [str(var.name) for var in function.params][-len(arrays) :]
    return [
        array ^ np.uint8(sign) if array.dtype == np.uint8 and name not in ("columns", "table") else array
        for name, array in zip(names, arrays, strict=True)
    ]


def packed_bias(isa_name: str, bias: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The bias that goes with turned bytes: ``sum(x * w) = sum((x - 128) * w) + 128 * sum(w)``."""
    if weight.dtype != np.int8:
        return bias
    return bias + isa(isa_name).sign * weight.reshape(len(weight), -1).sum(axis=1, dtype=np.int32)


def positions_of(geometry: Geometry) -> np.ndarray:
    """``[batch * height * width]``: where each pixel lies."""
    n, h, w = np.ogrid[: geometry.batch, : geometry.height, : geometry.width]
    return (geometry.base + n * geometry.image + h * geometry.pitch + w).ravel()


def is_padding(geometry: Geometry) -> np.ndarray:
    """bool ``[P]``: the positions that no pixel takes."""
    padding = np.ones(geometry.positions, bool)
    padding[positions_of(geometry)] = False
    return padding


def packed_of(x: np.ndarray, geometry: Geometry, fill: Any) -> np.ndarray:
    """NCHW -> packed: uint8 ``[C/4, P, 4]`` or float32 ``[quads * 4, P, 1]``; other positions and channels ``fill``."""
    batch, channels, height, width = x.shape
    assert (batch, height, width) == (geometry.batch, geometry.height, geometry.width)
    rows, depth = -(-channels // 4), 4 if x.dtype == np.uint8 else 1
    whole = np.full((rows * 4, geometry.positions), fill, x.dtype)
    whole[:channels, positions_of(geometry)] = x.transpose(1, 0, 2, 3).reshape(channels, -1)
    return whole.reshape(-1, depth, geometry.positions).transpose(0, 2, 1).copy()


def unpacked(y: np.ndarray, geometry: Geometry, channels: int) -> np.ndarray:
    """The inverse of ``packed_of``."""
    flat = y.transpose(0, 2, 1).reshape(-1, y.shape[1])[:channels, positions_of(geometry)]
    shape = (channels, geometry.batch, geometry.height, geometry.width)
    return flat.reshape(shape).transpose(1, 0, 2, 3)


def phases_of(x: np.ndarray, target: Geometry, window: Window, fill: Any) -> np.ndarray:
    """NCHW as the stride phases of ``window`` on a plane like ``target``: ``[rows * phases, P, depth]``.

    Phase (a, b) holds pixel (h * stride + a, w * stride + b) where an output pixel (h, w) has its place, and what its
    taps read to the right of and below the last output.
    """
    batch, channels = x.shape[:2]
    planes = []
    for phase in window.phases():
        shifts = [shift for other, shift in window.taps() if other == phase]
        part = x[:, :, phase[0] :: window.stride[0], phase[1] :: window.stride[1]]
        part = part[:, :, : target.height + max(0, *(s[0] for s in shifts), 0)]
        part = part[:, :, :, : target.width + max(0, *(s[1] for s in shifts), 0)]
        rows, depth = -(-channels // 4), 4 if x.dtype == np.uint8 else 1
        whole = np.full((rows * 4, target.positions), fill, x.dtype)
        n, h, w = np.ogrid[:batch, : part.shape[2], : part.shape[3]]
        places = target.base + n * target.image + h * target.pitch + w
        whole[:channels, places.ravel()] = part.transpose(1, 0, 2, 3).reshape(channels, -1)
        planes.append(whole.reshape(-1, depth, target.positions).transpose(0, 2, 1))
    return np.stack(planes, axis=1).reshape(-1, target.positions, planes[0].shape[2])


def geometry_for(x_shape: tuple[int, ...], out_shape: tuple[int, ...], window: Window) -> Geometry:
    """The output's plane, with the padding that the window must find."""
    reach = window.reach((x_shape[2], x_shape[3]), (out_shape[2], out_shape[3]))
    return Geometry(out_shape[0], out_shape[2], out_shape[3], *reach)


def output_size(size: tuple[int, int], window: Window, after: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width of what ``window`` makes of a map; ``after`` is the padding below and right."""
    after = window.padding if after is None else after
    out = [
        (size[i] + window.padding[i] + after[i] - window.dilation[i] * (window.kernel[i] - 1) - 1) // window.stride[i]
        + 1
        for i in (0, 1)
    ]
    return out[0], out[1]


def blocks_of(weight: np.ndarray, groups: int, form: str) -> Blocks:
    """OIHW weight -> blocks in the form ``dense``, ``1x4`` or ``4x4``."""
    n, c = weight.shape[:2]
    rows = expand_groups(weight.reshape(n, c, -1).transpose(0, 2, 1), groups)
    return dense_blocks(rows) if form == "dense" else sparse_blocks(rows, int(form[0]))


def padded(values: np.ndarray, length: int) -> np.ndarray:
    """``values`` with zeros at the end."""
    return np.pad(values, (0, length - len(values)))


def convolve(
    isa_name: str,
    x: np.ndarray,
    weight: np.ndarray,
    window: Window,
    *,
    form: str = "dense",
    groups: int = 1,
    zx: int = 0,
    bias: np.ndarray | None = None,
    m: np.ndarray | None = None,
    epilogue: Epilogue | None = None,
    residual: np.ndarray | None = None,
    after: tuple[int, int] | None = None,
    threads: int = 1,
    tiling: Tiling | None = None,
    ordered: bool | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The convolution kernel on NCHW ``x``: the result as NCHW, and what lies in its padding."""
    epilogue = epilogue or Epilogue()
    n = weight.shape[0]
    out_shape = (x.shape[0], n, *output_size((x.shape[2], x.shape[3]), window, after))
    target = geometry_for(x.shape, out_shape, window)
    source = phases_of(x, target, window, zx if x.dtype == np.uint8 else 0.0)
    blocks = blocks_of(weight, groups, form)
    places = Places(window, target, target)
    if tiling is None:
        extent = Extent.of(weight.reshape(*weight.shape[:2], -1).swapaxes(1, 2), places, isa(isa_name))
        tiling = tilings(extent, DENSE if form == "dense" else Form(int(form[0])), isa(isa_name), threads)[-1]
    if form != "dense" and (isa(isa_name).orders_rows if ordered is None else ordered):
        blocks = blocks.ordered(tiling.rows // 4)
    order = np.arange(blocks.rows) if blocks.order is None else blocks.order
    blocks = blocks.tiled(tiling.words)
    work = Convolution.of(blocks, source.shape[0], places, tiling, epilogue, threads)
    is_int8 = x.dtype == np.uint8
    zero = np.zeros(n, np.int32 if is_int8 else np.float32)
    arguments = [source, blocks.data, offsets(blocks, places), *([] if blocks.starts is None else [blocks.starts])]
    arguments += [] if blocks.order is None else [row_order(blocks.order)]
    arguments.append(padded(packed_bias(isa_name, zero if bias is None else bias, weight), blocks.rows)[order])
    arguments += [padded(m, blocks.rows)[order]] if is_int8 and m is not None else []
    if residual is not None:
        arguments.append(packed_of(residual, target, 99 if residual.dtype == np.uint8 else 9.9))
    arguments += [np.where(is_padding(target), 0, -1).astype(np.int32)] if target.is_padded else []
    packed = epilogue.output == "uint8"
    shape = (blocks.rows // 4, target.positions, 4) if packed else (blocks.rows, target.positions, 1)
    y = run_kernel(convolution(work, isa(isa_name)), isa_name, *arguments, garbage(shape, epilogue.output))
    return unpacked(y, target, n), y[:, is_padding(target)] if target.is_padded else y[:0]


def conv_float(x: np.ndarray, weight: np.ndarray, window: Window) -> np.ndarray:
    """float64, by the windows of the padded input."""
    (ph, pw), (sh, sw), (dh, dw) = window.padding, window.stride, window.dilation
    height, width = output_size(x.shape[2:], window)
    around = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    total = np.zeros((x.shape[0], weight.shape[0], height, width))
    for i in range(window.kernel[0]):
        for j in range(window.kernel[1]):
            rows, columns = (
                slice(i * dh, i * dh + sh * (height - 1) + 1, sh),
                slice(j * dw, j * dw + sw * (width - 1) + 1, sw),
            )
            total += np.einsum("nc,bchw->bnhw", weight[:, :, i, j].astype(np.float64), around[:, :, rows, columns])
    return total


def fold_zero_point(weight: np.ndarray, bias_q: np.ndarray, zx: int) -> np.ndarray:
    """The bias that the kernel takes: the input's zero point folded in."""
    return (bias_q.astype(np.int64) - zx * weight.astype(np.int64).reshape(len(weight), -1).sum(axis=1)).astype(
        np.int32
    )


def multiply_by(
    isa_name: str,
    x: np.ndarray,
    weight: np.ndarray,
    *,
    sparse: bool,
    bias: np.ndarray,
    m: np.ndarray | None = None,
    epilogue: Epilogue | None = None,
    residual: np.ndarray | None = None,
    threads: int = 1,
) -> np.ndarray:
    """The gemv kernel: ``weight`` ``[N, K]`` times ``x`` ``[K]`` or ``[positions, K]``, all N outputs of each."""
    epilogue = epilogue or Epilogue()
    is_int8, n, xs = weight.dtype == np.int8, len(weight), np.atleast_2d(x)
    tokens = Geometry.of_tokens(len(xs))
    slices = slice_rows(weight[:, None, :], isa(isa_name), sparse, len(xs))
    work = Gemv("int8" if is_int8 else "float32", slices.words, -(-n // 4) * 4, slices.work, not sparse, epilogue,
                threads, len(xs), has_lowest_pairs(slices.data))  # fmt: skip

    def stored(values: np.ndarray, fill: Any) -> np.ndarray:
        return packed_of(np.atleast_2d(values).T[None, :, None, :], tokens, fill)

    arguments = [stored(xs, 99 if is_int8 else np.nan), slices.data]
    arguments += [] if slices.lists is None else slices.lists.arrays.values()
    arguments += [slices.per_row(packed_bias(isa_name, bias, weight)), *([] if m is None else [slices.per_row(m)])]
    arguments += [] if residual is None else [stored(residual, 99 if residual.dtype == np.uint8 else np.nan)]
    shape = (work.rows // 4, work.pitch, 4) if epilogue.output == "uint8" else (work.rows, work.pitch, 1)
    y = run_kernel(gemv(work, isa(isa_name)), isa_name, *arguments, garbage(shape, epilogue.output))
    np.testing.assert_array_equal(y[:, len(xs) :], garbage(y[:, len(xs) :].shape, epilogue.output))
    return unpacked(y, tokens, n)[0, :, 0, :].T.reshape(*x.shape[:-1], n)
