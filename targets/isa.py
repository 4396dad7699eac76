"""What the kernels need to know of an instruction set: its vectors, and how it multiplies int8.

``dot4`` is the heart of every int8 kernel: ``acc[i] += sum over k of x[i][k] * w[i][k]`` with four unsigned bytes
times four signed bytes a lane, accumulated in int32 **without saturating**. Every form gives the same integers.
``vpmaddubsw`` is in none of them: it saturates at int16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.target import codegen

Expr = Any  # tirx.PrimExpr; TVM carries no types


@dataclass(frozen=True)
class Isa:
    """One instruction set: ``lanes`` 32-bit lanes a vector, ``registers`` vector registers.

    ``permute``: ``([t0, t1, ...], index)`` gives lane i word ``index[i]`` of the ``window`` words of the vectors t0,
    t1, ... put end to end. None where words have to be loaded one by one, and a window may be as wide as a byte can
    count.
    """

    name: str
    lanes: int
    registers: int
    dot: Callable[[int, Expr, Expr, Expr], Expr]
    window: int = 256
    permute: Callable[[list[Expr], Expr], Expr] | None = None

    @property
    def has_dot(self) -> bool:
        """Whether ``dot4`` is one instruction."""
        return self.dot is _vpdpbusd

    def dot4(self, acc: Expr, x: Expr, w: Expr) -> Expr:
        """``acc + x . w``: int32 vectors, ``x`` four uint8 a lane and ``w`` four int8 a lane, as int32 words."""
        return self.dot(self.lanes, acc, x, w)


def isa(name: str) -> Isa:
    """The instruction set called ``name``: vnni512, avx512bw, avxvnni, avx2 or portable."""
    return _ISAS[name]


def llvm(name: str, dtype: str, *args: Expr) -> Expr:
    """A call of the LLVM intrinsic ``name``."""
    number = codegen.llvm_lookup_intrinsic_id(name)
    return tirx.call_llvm_pure_intrin(dtype, tirx.const(number, "uint32"), *args)


def _vpdpbusd(lanes: int, acc: Expr, x: Expr, w: Expr) -> Expr:
    as_bytes = f"int8x{4 * lanes}"
    name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
    return llvm(name, f"int32x{lanes}", acc, tirx.reinterpret(as_bytes, x), tirx.reinterpret(as_bytes, w))


def _pmaddwd(lanes: int, acc: Expr, x: Expr, w: Expr) -> Expr:
    """Widening form: the even and the odd bytes as int16 pairs; 255 * 128 * 2 fits int32, so nothing saturates."""
    words, halves = f"int32x{lanes}", f"int16x{2 * lanes}"
    name = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd"}[lanes]

    def splat16(value: int) -> Expr:
        return tirx.Broadcast(tirx.const(value, "int16"), 2 * lanes)

    x16, w16 = tirx.reinterpret(halves, x), tirx.reinterpret(halves, w)
    x_even = tirx.reinterpret(halves, tirx.bitwise_and(x, tirx.Broadcast(tirx.const(0x00FF00FF, "int32"), lanes)))
    x_odd = tirx.reinterpret(halves, _shift_right_logical16(x16, 2 * lanes))
    w_even = tirx.shift_right(tirx.shift_left(w16, splat16(8)), splat16(8))
    w_odd = tirx.shift_right(w16, splat16(8))
    return acc + llvm(name, words, x_even, w_even) + llvm(name, words, x_odd, w_odd)


def _shift_right_logical16(value: Expr, lanes: int) -> Expr:
    unsigned = tirx.reinterpret(f"uint16x{lanes}", value)
    return tirx.shift_right(unsigned, tirx.Broadcast(tirx.const(8, "uint16"), lanes))


def _widened(lanes: int, acc: Expr, x: Expr, w: Expr) -> Expr:
    """Plain int32 arithmetic, for any target."""

    def splat(value: int) -> Expr:
        return tirx.Broadcast(tirx.const(value, "int32"), lanes)

    for byte in range(4):
        unsigned = tirx.bitwise_and(tirx.shift_right(x, splat(8 * byte)), splat(0xFF))
        signed = tirx.shift_right(tirx.shift_left(w, splat(24 - 8 * byte)), splat(24))
        acc = acc + unsigned * signed
    return acc


def _permute512(tables: list[Expr], index: Expr) -> Expr:
    """Each pair of vectors by one ``vpermt2d``, which reads the five lowest bits of the index; the next bit chooses."""
    name = "llvm.x86.avx512.vpermi2var.d.512"
    low, high = [llvm(name, "int32x16", tables[i], index, tables[i + 1]) for i in (0, 2)]
    is_low = tirx.bitwise_and(index, tirx.Broadcast(tirx.const(32, "int32"), 16)) == tirx.Broadcast(
        tirx.const(0, "int32"), 16
    )
    return tirx.Select(is_low, low, high)


def _permute256(tables: list[Expr], index: Expr) -> Expr:
    return llvm("llvm.x86.avx2.permd", "int32x8", tables[0], index)


_ISAS = {
    instruction_set.name: instruction_set
    for instruction_set in (
        Isa("vnni512", lanes=16, registers=32, dot=_vpdpbusd, window=64, permute=_permute512),
        Isa("avx512bw", lanes=16, registers=32, dot=_pmaddwd, window=64, permute=_permute512),
        Isa("avxvnni", lanes=8, registers=16, dot=_vpdpbusd, window=8, permute=_permute256),
        Isa("avx2", lanes=8, registers=16, dot=_pmaddwd, window=8, permute=_permute256),
        Isa("portable", lanes=4, registers=16, dot=_widened),
    )
}
