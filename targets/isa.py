"""What the kernels need to know of an instruction set: its vectors, and how it multiplies int8.

``dot4`` is the heart of every int8 kernel: ``acc[i] += sum over k of x[i][k] * w[i][k]`` with four bytes of
activations times four signed bytes of weights a lane, accumulated in int32 **without saturating**. Every form gives the
same integers. ``vpmaddubsw`` is in none of them: it saturates at int16.

Activations are 0..255. Where the product takes signed bytes only (``sdot``, ``smull``), what is packed holds each byte
with its highest bit turned, ``x ^ 0x80``, which read as signed is ``x - 128``, and layers have ``128 * sum(w)`` more in
their bias. A layer spends no other instruction on it: saturating narrowing moves come for signed bytes too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from tvm import tirx

from pumice.targets import neon
from pumice.targets.intrinsics import Expr, llvm

Dot = Callable[[int, Expr, Expr, Expr], Expr]
Narrow = Callable[[int, Expr, Expr], Expr]


@dataclass(frozen=True)
class Isa:
    """One instruction set: ``lanes`` 32-bit lanes a vector, ``registers`` vector registers.

    ``permute``: ``([t0, t1, ...], index)`` gives lane i word ``index[i]`` of the ``window`` words of the vectors t0,
    t1, ... put end to end. None where words have to be loaded one by one, and a window may be as wide as a byte can
    count.
    ``cautious``: the product for weights with two of -128 side by side, where ``dot`` may not take these.
    ``narrow``: two vectors of int32 to one of int16, and two of these to one of bytes as they are packed, saturating;
    in each 128 bits the first comes first. None where that is done with minimum and maximum.
    ``rounds``: float32 to int32, half to even. None where ``llvm.lrint`` is one instruction.
    ``sign``: what packed bytes are turned by, 0x80 where the product takes signed ones, else 0.
    ``by_lane``: whether weights of rows that share a block are loaded as one vector, for products by its lanes.
    ``hide``: keeps from LLVM that a word of weights is in all lanes, where that misleads it.
    ``orders_rows``: whether sparse rows are computed in an order that the CPU's branch predictor can follow.
    ``shuffle``: ``(words, control)`` gives byte i of each 128 bits their byte ``control[i]``. None where that takes
    plain arithmetic.
    ``fuses``: whether ``a * b + c`` of floats, rounded once, is one instruction; else it is a call of libm.
    """

    name: str
    lanes: int
    registers: int
    dot: Dot
    window: int = 256
    permute: Callable[[list[Expr], Expr], Expr] | None = None
    cautious: Dot | None = None
    narrow: tuple[Narrow, Narrow] | None = None
    rounds: Callable[[int, Expr], Expr] | None = None
    sign: int = 0
    by_lane: bool = False
    hide: Callable[[int, Expr], Expr] | None = None
    orders_rows: bool = False
    shuffle: Callable[[int, Expr, Expr], Expr] | None = None
    fuses: bool = True

    @property
    def has_dot(self) -> bool:
        """Whether ``dot4`` is one instruction."""
        return self.dot in _SINGLE

    @property
    def is_gpu(self) -> bool:
        """Whether threads run side by side, each for one position, instead of lanes."""
        return self.lanes == 1

    def dot4(self, acc: Expr, x: Expr, w: Expr) -> Expr:
        """``acc + x . w``: int32 vectors, ``x`` four packed bytes a lane and ``w`` four int8 a lane, as int32 words."""
        return self.dot(self.lanes, acc, x, w)

    def round(self, value: Expr) -> Expr:
        """float32 to int32, half to even, of numbers that fit."""
        if self.rounds is not None:
            return self.rounds(self.lanes, value)
        return llvm("llvm.lrint", f"int32x{self.lanes}" if self.lanes > 1 else "int32", value)

    def for_weights(self, has_lowest_pairs: bool) -> Isa:
        """The same, with a product that may take weights with two of -128 side by side, if there are any."""
        return replace(self, dot=self.cautious) if has_lowest_pairs and self.cautious is not None else self

    def twin(self) -> Isa:
        """The same in plain arithmetic, for any LLVM target: kernels read and write the same bytes at the same places.

        With it a library for another CPU is proven right on this one.
        """
        return replace(
            self,
            dot=partial(_widened, sign=self.sign),
            permute=None if self.permute is None else partial(_select, self.lanes),
            cautious=None,
            shuffle=None,
            hide=None,
            narrow=None,
            rounds=None,
        )


def isa(name: str) -> Isa:
    """The instruction set called ``name``: vnni512, avx512bw, avxvnni, avx2, neon, dotprod, i8mm, cuda or portable."""
    return _ISAS[name]


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


def _widened(lanes: int, acc: Expr, x: Expr, w: Expr, sign: int = 0) -> Expr:
    """Plain int32 arithmetic, for any target."""

    def splat(value: int) -> Expr:
        return tirx.Broadcast(tirx.const(value, "int32"), lanes) if lanes > 1 else tirx.const(value, "int32")

    def signed(word: Expr, byte: int) -> Expr:
        return tirx.shift_right(tirx.shift_left(word, splat(24 - 8 * byte)), splat(24))

    for byte in range(4):
        unsigned = tirx.bitwise_and(tirx.shift_right(x, splat(8 * byte)), splat(0xFF))
        acc = acc + (signed(x, byte) if sign else unsigned) * signed(w, byte)
    return acc


def _select(lanes: int, tables: list[Expr], index: Expr) -> Expr:
    """A permutation in plain arithmetic."""
    found = tables[0]
    for word in range(lanes * len(tables)):
        chosen = tirx.Shuffle([tables[word // lanes]], [word % lanes] * lanes)
        found = tirx.Select(index == tirx.Broadcast(tirx.const(word, "int32"), lanes), chosen, found)
    return found


def _permute512(tables: list[Expr], index: Expr) -> Expr:
    """Each pair of vectors by one ``vpermt2d``, which reads the five lowest bits of the index; the next bit chooses."""
    name = "llvm.x86.avx512.vpermi2var.d.512"
    low, *high = [llvm(name, "int32x16", tables[i], index, tables[i + 1]) for i in range(0, len(tables), 2)]
    if not high:
        return low
    is_low = tirx.bitwise_and(index, tirx.Broadcast(tirx.const(32, "int32"), 16)) == tirx.Broadcast(
        tirx.const(0, "int32"), 16
    )
    return tirx.Select(is_low, low, high[0])


def _permute256(tables: list[Expr], index: Expr) -> Expr:
    return llvm("llvm.x86.avx2.permd", "int32x8", tables[0], index)


def _pshufb(name: str, lanes: int, word: Expr, control: Expr) -> Expr:
    as_bytes = f"int8x{4 * lanes}"
    found = llvm(name, as_bytes, tirx.reinterpret(as_bytes, word), tirx.reinterpret(as_bytes, control))
    return tirx.reinterpret(f"int32x{lanes}", found)


def _pack(name: str, dtype: str, lanes: int, first: Expr, second: Expr) -> Expr:
    return llvm(name, f"{dtype}x{2 * lanes if dtype == 'int16' else 4 * lanes}", first, second)


def _packs(prefix: str, suffix: str) -> tuple[Narrow, Narrow]:
    return (
        partial(_pack, f"llvm.x86.{prefix}.packssdw{suffix}", "int16"),
        partial(_pack, f"llvm.x86.{prefix}.packuswb{suffix}", "int8"),
    )


_SINGLE = (_vpdpbusd, neon.sdot, neon.usdot)
_512 = partial(
    Isa,
    lanes=16,
    registers=32,
    window=64,
    permute=_permute512,
    narrow=_packs("avx512", ".512"),
    orders_rows=True,
    shuffle=partial(_pshufb, "llvm.x86.avx512.pshuf.b.512"),
)
_256 = partial(
    Isa,
    lanes=8,
    registers=16,
    window=8,
    permute=_permute256,
    narrow=_packs("avx2", ""),
    orders_rows=True,
    shuffle=partial(_pshufb, "llvm.x86.avx2.pshuf.b"),
)
# Of the 32, neon's product wants some for what it adds up on the way.
_NEON = partial(Isa, lanes=4, registers=32, rounds=neon.round_to_even, by_lane=True)
_SIGNED = partial(_NEON, sign=0x80, narrow=(neon.narrow_words, neon.narrow_to_signed))

_ISAS = {
    instruction_set.name: instruction_set
    for instruction_set in (
        _512("vnni512", dot=_vpdpbusd),
        _512("avx512bw", dot=_pmaddwd),
        _256("avxvnni", dot=_vpdpbusd),
        _256("avx2", dot=_pmaddwd),
        _SIGNED("neon", dot=neon.multiply_pairs, cautious=neon.multiply_wide, hide=neon.hide, registers=26),
        _SIGNED("dotprod", dot=neon.sdot),
        _NEON("i8mm", dot=neon.usdot, narrow=(neon.narrow_words, neon.narrow_to_unsigned)),
        Isa("portable", lanes=4, registers=16, dot=_widened, fuses=False),
        Isa("cuda", lanes=1, registers=8, dot=_widened),
    )
}
