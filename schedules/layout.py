"""Into and out of the packed form, and from one plane to another.

``pack`` reads a plain float32 tensor and writes ``[C/4, P, 4]`` uint8 (quantizing) or ``[C, P, 1]`` float32;
``unpack`` is its inverse; ``planes`` splits a packed tensor into the stride phases that a strided window reads, or
moves it to a plane with other padding. Maps are plain NCHW; tokens are plain ``[T, C]``.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.schedules import emit
from pumice.schedules.emit import Buffer, Expr
from pumice.schedules.geometry import Geometry, Window
from pumice.targets.isa import Isa


@dataclass(frozen=True)
class Packing:
    """A plain float32 tensor of ``channels`` at the pixels of ``geometry``, and its packed form.

    ``scale`` and ``zero_point`` are None for packed float32. ``tokens`` says that channels are innermost.
    """

    channels: int
    geometry: Geometry
    tokens: bool
    scale: float | None = None
    zero_point: int = 0
    threads: int = 1

    @property
    def depth(self) -> int:
        """Channels in a word."""
        return 1 if self.scale is None else 4

    @property
    def rows(self) -> int:
        """Rows of the packed tensor. Float rows come in quads like the rest, so that kernels can agree."""
        return -(-self.channels // 4) * (4 // self.depth)

    @property
    def packed_shape(self) -> tuple[int, int, int]:
        """The packed tensor's shape."""
        return self.rows, self.geometry.positions, self.depth

    @property
    def size(self) -> int:
        """Elements of the plain tensor."""
        return self.channels * self.geometry.pixels


def pack(work: Packing, isa: Isa, name: str = "pack") -> tirx.PrimFunc:
    """Arguments: x float32 ``[pixels * channels]`` flat; y packed. Padding is filled with the zero point."""

    def body() -> None:
        x, y = emit.arguments(
            x=((work.size,), "float32"), y=(work.packed_shape, "float32" if work.scale is None else "uint8")
        )
        parallel = work.threads > 1 and work.size > _PARALLEL_SIZE
        if work.tokens and work.geometry.positions == work.geometry.pixels == 1:
            _pack_vector(work, isa, x, y)
            return
        with emit.loop(work.rows, parallel) as row:
            if work.geometry.is_padded:
                _fill(work, isa, y, row)
            (_pack_tokens if work.tokens else _pack_maps)(work, isa, x, y, row)

    return emit.kernel(name, body)


def unpack(work: Packing, isa: Isa, name: str = "unpack") -> tirx.PrimFunc:
    """Arguments: x packed; y float32 ``[pixels * channels]`` flat. uint8 becomes ``(x - zero_point) * scale``."""

    def body() -> None:
        x, y = emit.arguments(
            x=(work.packed_shape, "float32" if work.scale is None else "uint8"), y=((work.size,), "float32")
        )
        parallel = work.threads > 1 and work.size > _PARALLEL_SIZE
        if work.tokens and work.channels % 4 == 0 and work.geometry.pixels > 1:
            with emit.loop(work.channels // 4, parallel) as quad:
                _unpack_tokens(work, isa, x, y, quad)
            return
        with emit.loop(work.rows, parallel) as row:
            for byte in range(work.depth):
                channel = row * work.depth + byte
                if work.channels % 4 == 0:
                    _unpack_channel(work, isa, x, y, row, byte)
                else:
                    with T.If(channel < work.channels), T.Then():
                        _unpack_channel(work, isa, x, y, row, byte)

    return emit.kernel(name, body)


def quantize_packed(work: Packing, isa: Isa, name: str = "quantize") -> tirx.PrimFunc:
    """Packed float32 to packed uint8 on the same plane: four rows become one.

    Arguments: x float32 ``[4 * rows, P, 1]``; y uint8 ``[rows, P, 4]``. Zeros in the padding become the zero point.
    """

    def body() -> None:
        positions = work.geometry.positions
        x, y = emit.arguments(x=((work.rows * 4, positions, 1), "float32"), y=(work.packed_shape, "uint8"))

        def strip(row: Expr, at: Expr, lanes: int) -> None:
            loaded = [emit.load(x, (row * 4 + byte) * positions + at, lanes) for byte in range(4)]
            values = [_quantize(work, value, lanes) for value in loaded]
            emit.store(y, row * positions + at, emit.turn(emit.pack_bytes(values, lanes), isa, lanes), lanes)

        parallel = work.threads > 1 and work.size > _PARALLEL_SIZE
        with emit.loop(work.rows, parallel) as row:
            emit.for_strips(positions, isa.lanes, lambda at, lanes: strip(row, at, lanes))

    return emit.kernel(name, body)


@dataclass(frozen=True)
class Planes:
    """``rows`` words of ``source`` pixels, split into the phases of ``window`` on planes like ``target``.

    The result is ``[rows * phases, P of target, depth]``; what no pixel fills holds ``fill`` (a byte, or a float).
    """

    rows: int
    source: Geometry
    target: Geometry
    window: Window
    dtype: str  # uint8 or float32
    fill: float
    threads: int = 1

    @property
    def depth(self) -> int:
        """Channels in a word."""
        return 4 if self.dtype == "uint8" else 1


def planes(work: Planes, isa: Isa, name: str = "planes") -> tirx.PrimFunc:
    """Arguments: x ``[rows, P of source, depth]``; y ``[rows * phases, P of target, depth]``."""

    def body() -> None:
        phases = work.window.phases()
        x, y = emit.arguments(
            x=((work.rows, work.source.positions, work.depth), work.dtype),
            y=((work.rows * len(phases), work.target.positions, work.depth), work.dtype),
        )
        parallel = work.threads > 1 and work.rows * work.source.pixels > _PARALLEL_SIZE
        with emit.loop(work.rows, parallel) as row:
            for index, phase in enumerate(phases):
                _one_plane(work, isa, x, y, row, (row * len(phases) + index) * work.target.positions, phase)

    return emit.kernel(name, body)


def _one_plane(work: Planes, isa: Isa, x: Buffer, y: Buffer, row: Expr, out: Expr, phase: tuple[int, int]) -> None:
    word = emit.packed_word(int(work.fill), isa) if work.dtype == "uint8" else float(work.fill)
    dtype = "int32" if work.dtype == "uint8" else "float32"
    emit.fill(y, out, work.target.positions, word, dtype, isa.lanes)
    source, target, stride = work.source, work.target, work.window.stride
    after = [max(s[axis] for p, s in work.window.taps() if p == phase) for axis in (0, 1)]
    heights = min((source.height - 1 - phase[0]) // stride[0] + 1, target.height + max(0, after[0]))
    widths = min((source.width - 1 - phase[1]) // stride[1] + 1, target.width + max(0, after[1]))
    if heights <= 0 or widths <= 0:
        return
    with emit.loop(work.source.batch) as n, emit.loop(heights) as h:
        from_ = row * source.positions + source.base + n * source.image + (h * stride[0] + phase[0]) * source.pitch
        to = out + target.base + n * target.image + h * target.pitch
        if stride[1] == 1:
            emit.for_strips(
                widths, isa.lanes, lambda i, k: emit.store(y, to + i, emit.load(x, from_ + phase[1] + i, k), k)
            )
        else:
            _copy_strided(x, y, from_, to, widths, source.width, stride[1], phase[1], isa.lanes)


def _copy_strided(
    x: Buffer, y: Buffer, from_: Expr, to: Expr, count: int, width: int, stride: int, phase: int, lanes: int
) -> None:
    """``y[to + i] = x[from_ + i * stride + phase]``; by twos, whole vectors are read and every other word picked."""
    # Of rows that end on an odd pixel the vectors read no further.
    whole = min(count, width // 2) // lanes if stride == 2 and lanes > 1 else 0
    if whole:
        picked = [tirx.const(2 * i + phase, "int32") for i in range(lanes)]
        with emit.loop(whole) as i:
            pair = [emit.load(x, from_ + (2 * i + half) * lanes, lanes) for half in (0, 1)]
            emit.store(y, to + i * lanes, tirx.Shuffle(pair, picked), lanes)
    if count > whole * lanes:
        with emit.loop(count - whole * lanes) as i:
            w = i + whole * lanes
            T.buffer_store(y, x[from_ + w * stride + phase], [to + w])


def _fill(work: Packing, isa: Isa, y: Buffer, row: Expr) -> None:
    value, dtype = (0.0, "float32") if work.scale is None else (emit.packed_word(work.zero_point, isa), "int32")
    positions = work.geometry.positions
    emit.fill(y, row * positions, positions, value, dtype, isa.lanes)


def _quantize(work: Packing, value: Expr, lanes: int) -> Expr:
    """``clamp(round_half_even(x / scale) + zero_point)``; a NaN becomes the zero point."""
    assert work.scale is not None
    scaled = value / emit.splat(work.scale, lanes, "float32")
    number = tirx.Select(emit.is_nan(value, lanes), emit.splat(0.0, lanes, "float32"), scaled)
    return emit.round_to_int(number, 0, 255, work.zero_point, lanes)


def _pack_maps(work: Packing, isa: Isa, x: Buffer, y: Buffer, row: Expr) -> None:
    """One packed row from NCHW: channels are read side by side along a row of pixels."""
    geometry = work.geometry
    plane = geometry.height * geometry.width

    def strip(n: Expr, h: Expr, w: Expr, lanes: int) -> None:
        values = []
        for byte in range(work.depth):
            channel = row * work.depth + byte
            at = (n * work.channels + channel) * plane + h * geometry.width + w
            zero = emit.splat(0.0, lanes, "float32")
            if work.channels % 4:
                at = tirx.min(at, tirx.const(work.size - lanes, "int32"))
                inside = channel < work.channels
                value = tirx.Select(emit.splat(inside, lanes), emit.load(x, at, lanes), zero)
            else:
                value = emit.load(x, at, lanes)
            values.append(value if work.scale is None else _quantize(work, value, lanes))
        word = values[0] if work.scale is None else emit.turn(emit.pack_bytes(values, lanes), isa, lanes)
        to = row * geometry.positions + geometry.base + n * geometry.image + h * geometry.pitch + w
        emit.store(y, to, word, lanes)

    with emit.loop(geometry.batch) as n, emit.loop(geometry.height) as h:
        emit.for_strips(geometry.width, isa.lanes, lambda w, lanes: strip(n, h, w, lanes))


def _pack_tokens(work: Packing, isa: Isa, x: Buffer, y: Buffer, row: Expr) -> None:
    """One packed row from ``[T, C]``: the words of neighbouring channels, token after token."""
    geometry = work.geometry
    with emit.loop(geometry.pixels) as token:
        to = row * geometry.positions + _token_position(geometry, token)
        T.buffer_store(y, _word(work, isa, x, row, token), [to])


def _pack_vector(work: Packing, isa: Isa, x: Buffer, y: Buffer) -> None:
    with emit.loop(work.rows) as row:
        T.buffer_store(y, _word(work, isa, x, row, tirx.const(0, "int32")), [row])


def _word(work: Packing, isa: Isa, x: Buffer, row: Expr, token: Expr) -> Expr:
    """A channel, or the bytes of four neighbouring ones, as they are packed."""
    if work.scale is None:
        return _channel(work, x, row, token)
    if isa.is_gpu:
        values = [_quantize(work, _channel(work, x, row * 4 + byte, token), 1) for byte in range(4)]
        return emit.turn(emit.pack_bytes(values, 1), isa, 1)
    as_bytes = tirx.Cast("uint8x4", _quantize(work, _four_channels(work, x, row, token), 4))
    return emit.turn(tirx.reinterpret("int32", as_bytes), isa, 1)


def _four_channels(work: Packing, x: Buffer, row: Expr, token: Expr) -> Expr:
    """float32x4: four neighbouring channels of a token, zero beyond the last."""
    if work.channels % 4 == 0:
        return emit.load(x, token * work.channels + row * 4, 4)
    staged = T.alloc_buffer((4,), "float32", scope="global")
    for byte in range(4):
        T.buffer_store(staged, _channel(work, x, row * 4 + byte, token), [byte])
    return emit.load(staged, 0, 4)


def _channel(work: Packing, x: Buffer, channel: Expr, token: Expr) -> Expr:
    """float32: one channel of a token, zero beyond the last."""
    at = token * work.channels + channel
    if work.channels % 4 == 0:
        return x[at]
    inside = x[tirx.min(at, tirx.const(work.size - 1, "int32"))]
    return tirx.Select(channel < work.channels, inside, tirx.const(0.0, "float32"))


def _unpack_channel(work: Packing, isa: Isa, x: Buffer, y: Buffer, row: Expr, byte: int) -> None:
    geometry = work.geometry
    channel = row * work.depth + byte
    plane = geometry.height * geometry.width

    def strip(n: Expr, h: Expr, w: Expr, lanes: int) -> None:
        at = row * geometry.positions + geometry.base + n * geometry.image + h * geometry.pitch + w
        value = emit.load(x, at, lanes)
        if work.scale is not None:
            centred = emit.byte_of(emit.turn(value, isa, lanes), byte, lanes) - emit.splat(work.zero_point, lanes)
            value = emit.to_float(centred, lanes) * emit.splat(work.scale, lanes, "float32")
        if work.tokens:
            to = (n * plane + h * geometry.width + w) * work.channels + channel
            index = tirx.Ramp(to, tirx.const(work.channels, "int32"), lanes) if lanes > 1 else to
            T.buffer_store(y, value, [index])
        else:
            emit.store(y, (n * work.channels + channel) * plane + h * geometry.width + w, value, lanes)

    with emit.loop(geometry.batch) as n, emit.loop(geometry.height) as h:
        emit.for_strips(geometry.width, isa.lanes, lambda w, lanes: strip(n, h, w, lanes))


def _unpack_tokens(work: Packing, isa: Isa, x: Buffer, y: Buffer, quad: Expr) -> None:
    """Four channels of every token: vectors over tokens, interleaved so that a token's four are stored at once."""
    geometry = work.geometry

    def channels(position: Expr, lanes: int) -> list[Expr]:
        if work.scale is None:
            rows = [(quad * 4 + r) * geometry.positions for r in range(4)]
            return [emit.load(x, row + position, lanes) for row in rows]
        word = emit.turn(emit.load(x, quad * geometry.positions + position, lanes), isa, lanes)
        centred = [emit.byte_of(word, byte, lanes) - emit.splat(work.zero_point, lanes) for byte in range(4)]
        return [emit.to_float(value, lanes) * emit.splat(work.scale, lanes, "float32") for value in centred]

    def strip(n: Expr, h: Expr, w: Expr, lanes: int) -> None:
        position = geometry.base + n * geometry.image + h * geometry.pitch + w
        token = (n * geometry.height + h) * geometry.width + w
        values = channels(position, lanes)
        for lane in range(lanes):
            to = (token + lane) * work.channels + quad * 4
            if lanes == 1:
                for r, value in enumerate(values):
                    T.buffer_store(y, value, [to + r])
            else:
                picked = [tirx.const(r * lanes + lane, "int32") for r in range(4)]
                emit.store(y, to, tirx.Shuffle(values, picked), 4)

    with emit.loop(geometry.batch) as n, emit.loop(geometry.height) as h:
        emit.for_strips(geometry.width, isa.lanes, lambda w, lanes: strip(n, h, w, lanes))


def _token_position(geometry: Geometry, token: Expr) -> Expr:
    """The position of pixel number ``token``, counted row by row."""
    if geometry.height == 1 and geometry.batch == 1:
        return token + geometry.base
    plane = geometry.height * geometry.width
    n, h, w = token // plane, (token % plane) // geometry.width, token % geometry.width
    return geometry.base + n * geometry.image + h * geometry.pitch + w


_PARALLEL_SIZE = 100_000  # elements below which waking the other threads costs more than it saves
