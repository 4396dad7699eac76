"""Vector idioms of the kernels, written once: loads, stores, splats, rounding, the bytes of a word.

Kernels are built with TVM's IR builder: a Python loop unrolls, a ``with T.serial(...)`` loops at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from pumice.targets.intrinsics import llvm
from pumice.targets.isa import Isa

Expr = Any
Buffer = Any


def kernel(name: str, body: Callable[[], None]) -> tirx.PrimFunc:
    """The PrimFunc called ``name`` whose arguments and statements ``body`` declares."""
    with IRBuilder() as builder, T.prim_func(is_private=True):
        T.func_name(name)
        # 8 is "opaque": FuseOps leaves the kernel alone.
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        body()
    return builder.get()


def argument(name: str, shape: tuple[int, ...], dtype: str) -> Buffer:
    """The next argument of the kernel."""
    return T.arg(name, T.buffer(shape, dtype))


def arguments(**specs: tuple[tuple[int, ...], str]) -> list[Buffer]:
    """All arguments of a kernel, as flat views in 4-byte elements: words of bytes as int32, the others as they are."""
    declared = [argument(name, shape, dtype) for name, (shape, dtype) in specs.items()]
    kinds = [dtype if dtype in ("float32", "int32") else "int32" for _, dtype in specs.values()]
    return [words_of(buffer, kind) for buffer, kind in zip(declared, kinds, strict=True)]


def words_of(buffer: Buffer, dtype: str = "int32") -> Buffer:
    """A flat view of ``buffer`` in 4-byte elements."""
    size = 1
    for extent in buffer.shape:
        size *= int(extent)
    return T.decl_buffer((size // (4 if str(buffer.dtype) in ("int8", "uint8") else 1),), dtype, data=buffer.data)


def load(buffer: Buffer, offset: Expr, lanes: int) -> Expr:
    """``lanes`` neighbours of a flat buffer."""
    return buffer[_range(offset, lanes)]


def store(buffer: Buffer, offset: Expr, value: Expr, lanes: int) -> None:
    """Write ``lanes`` neighbours of a flat buffer."""
    T.buffer_store(buffer, value, [_range(offset, lanes)])


def registers(count: int, lanes: int, dtype: str) -> list[Buffer]:
    """``count`` vectors that live in registers.

    One buffer each, and "global": TVM puts on the heap what is larger than 1 KB, and in a parallel loop all else.
    """
    return [T.alloc_buffer((lanes,), dtype, scope="global") for _ in range(count)]


def prefetch(buffer: Buffer, offset: Expr) -> None:
    """Ask for the cache line of an element, which need not exist."""
    address = tirx.address_of(buffer[offset])
    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, 0, 3, 1))


def splat(value: Expr | int | float, lanes: int, dtype: str = "int32") -> Expr:
    """One value in every lane."""
    scalar = tirx.const(value, dtype) if isinstance(value, int | float) else value
    return tirx.Broadcast(scalar, lanes) if lanes > 1 else scalar


def vector(dtype: str, lanes: int) -> str:
    """The name of a vector type; one lane is a scalar."""
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def fma(a: Expr, b: Expr, c: Expr, lanes: int) -> Expr:
    """``a * b + c`` rounded once: explicit, so that every target gives the same float32."""
    return llvm("llvm.fma", vector("float32", lanes), a, b, c)


def to_float(value: Expr, lanes: int) -> Expr:
    """int32 -> float32, to nearest even."""
    return tirx.Cast(vector("float32", lanes), value)


def exp(x: Expr, lanes: int) -> Expr:
    """e to the ``x`` in float32, within two units in the last place, on vectors.

    Below -87.3 it gives the smallest normal number rather than zero, above 88.3 the largest power. NaN stays NaN.
    Cody and Waite's reduction to ``|rest| <= log(2) / 2``, there the polynomial of least relative error (2e-9).
    """
    dtype = vector("float32", lanes)

    def number(value: float) -> Expr:
        return splat(value, lanes, "float32")

    x = at_most(at_least(x, number(-87.33654)), number(88.37626))
    # Added to this number, a float is rounded to an integer whose biased exponent is in the lowest bits of the sum.
    shift = 1.5 * 2**23 + 127
    shifted = fma(x, number(1.44269504088896341), number(shift), lanes)
    power = shifted - number(shift)
    rest = fma(power, number(2.12194440e-4), fma(power, number(-0.693359375), x, lanes), lanes)
    series = number(1.38367921e-3)
    for coefficient in (8.374858602e-3, 4.16682288e-2, 1.666641966e-1, 4.999999206e-1, 1.000000036, 1.0):
        series = fma(series, rest, number(coefficient), lanes)
    exponent = tirx.reinterpret(vector("int32", lanes), shifted)
    return series * tirx.reinterpret(dtype, tirx.shift_left(exponent, splat(23, lanes)))


def at_least(value: Expr, bound: Expr) -> Expr:
    """The larger of the two; NaN where ``value`` is NaN (``tirx.max`` would give ``bound``)."""
    return tirx.Select(value < bound, bound, value)


def at_most(value: Expr, bound: Expr) -> Expr:
    """The smaller of the two; NaN where ``value`` is NaN."""
    return tirx.Select(value > bound, bound, value)


def is_nan(value: Expr, lanes: int) -> Expr:
    """Whether each float32 is NaN, by its bits: TVM takes ``value == value`` for always true."""
    bits = tirx.bitwise_and(tirx.reinterpret(vector("int32", lanes), value), splat(0x7FFFFFFF, lanes))
    return bits > splat(0x7F800000, lanes)


def round_to_int(value: Expr, low: int, high: int, zero_point: int, lanes: int) -> Expr:
    """``clamp(round_half_even(value) + zero_point, low, high)`` as int32."""
    clamped = fitting(value, low, high, zero_point, lanes)
    rounded = llvm("llvm.lrint", vector("int32", lanes), clamped)  # rounds as the CPU is set: half to even
    return rounded + splat(zero_point, lanes) if zero_point else rounded


def fitting(value: Expr, low: float, high: float, zero_point: int, lanes: int) -> Expr:
    """A float clamped so that, rounded and moved by ``zero_point``, it lies in ``low`` .. ``high``.

    The clamp comes before the rounding: its bounds are integers, so that the two commute, and what is converted
    then always fits.
    """
    clamped = tirx.max(value, splat(float(low - zero_point), lanes, "float32"))
    return tirx.min(clamped, splat(float(high - zero_point), lanes, "float32"))


def across(operation: str, value: Expr, lanes: int) -> Expr:
    """The sum (``add`` of int32, ``fadd`` of float32, in order) or maximum (``fmax``) of a vector's lanes."""
    if lanes == 1:
        return value
    start = (tirx.const(0.0, "float32"),) if operation == "fadd" else ()
    return llvm(f"llvm.vector.reduce.{operation}", "int32" if operation == "add" else "float32", *start, value)


def byte_of(word: Expr, which: Expr | int, lanes: int) -> Expr:
    """Byte ``which`` (0 lowest) of each word, as int32 0..255."""
    shift = which * 8 if isinstance(which, int) else which * tirx.const(8, "int32")
    return tirx.bitwise_and(tirx.shift_right(word, splat(shift, lanes)), splat(255, lanes))


def pack_bytes(values: list[Expr], lanes: int) -> Expr:
    """Four int32 vectors of 0..255 -> one vector of words, the first lowest."""
    word = values[0]
    for byte, value in enumerate(values[1:], 1):
        word = tirx.bitwise_or(word, tirx.shift_left(value, splat(8 * byte, lanes)))
    return word


def turn(word: Expr, isa: Isa, lanes: int) -> Expr:
    """Bytes as they are packed from bytes in 0..255, and the other way."""
    return tirx.bitwise_xor(word, splat(splat_word(isa.sign), lanes)) if isa.sign else word


def turn_each(byte: Expr, isa: Isa, lanes: int) -> Expr:
    """The same for one byte in each int32."""
    return tirx.bitwise_xor(byte, splat(isa.sign, lanes)) if isa.sign else byte


@contextmanager
def loop(count: int, parallel: bool = False) -> Iterator[Expr]:
    """A loop of ``count`` steps, over threads if ``parallel``; a single step is no loop."""
    if count == 1:
        yield tirx.const(0, "int32")
    else:
        with T.parallel(0, count) if parallel else T.serial(0, count) as i:
            yield i


def either(condition: Expr, first: int, second: int, body: Callable[[bool], None]) -> None:
    """``body(True)`` where ``condition`` holds and ``body(False)`` elsewhere; of two numbers a zero says "never"."""
    if not (first and second):
        body(bool(first))
        return
    with T.If(condition):
        with T.Then():
            body(True)
        with T.Else():
            body(False)


def packed_word(byte: int, isa: Isa) -> int:
    """A word of four equal bytes as they are packed, as a signed int32."""
    return splat_word(byte ^ isa.sign)


def splat_word(byte: int) -> int:
    """A word of four equal bytes, as a signed int32."""
    return int.from_bytes(bytes([byte] * 4), "little", signed=True)


def fill(buffer: Buffer, start: Expr | int, length: int, value: int | float, dtype: str, lanes: int) -> None:
    """Set ``length`` elements of a flat buffer."""
    for_strips(length, lanes, lambda i, n: store(buffer, start + i, splat(value, n, dtype), n))


def for_strips(length: int, lanes: int, body: Callable[[Expr, int], None]) -> None:
    """``body(offset, count)`` over ``length`` elements: whole vectors first, then the rest one by one."""
    whole, rest = divmod(length, lanes)
    if whole:
        with loop(whole) as i:
            body(i * lanes, lanes)
    if rest:
        with loop(rest) as i:
            body(i + whole * lanes, 1)


def _range(offset: Expr | int, lanes: int) -> Expr:
    start = tirx.const(offset, "int32") if isinstance(offset, int) else offset
    return tirx.Ramp(start, tirx.const(1, "int32"), lanes) if lanes > 1 else start
