"""NEON's products and narrowing moves: four words a vector, signed bytes times signed bytes but for ``usdot``."""

from __future__ import annotations

from tvm import tirx

from pumice.targets.intrinsics import Expr, llvm


def sdot(lanes: int, acc: Expr, x: Expr, w: Expr) -> Expr:
    """Signed times signed (FEAT_DotProd)."""
    return _dot("llvm.aarch64.neon.sdot", acc, x, w)


def usdot(lanes: int, acc: Expr, x: Expr, w: Expr) -> Expr:
    """Unsigned times signed (FEAT_I8MM)."""
    return _dot("llvm.aarch64.neon.usdot", acc, x, w)


def multiply_pairs(lanes: int, acc: Expr, x: Expr, w: Expr) -> Expr:
    """``smull``, ``smull2``, ``addp``, ``sadalp``: two products are added as int16, then two sums as int32.

    The largest sum of two is 2 * 128 * 128: one too many for int16, where both weights are -128. All others fit.
    """
    low, high = _products(x, w)
    return acc + _pairs("int32x4", llvm("llvm.aarch64.neon.addp", "int16x8", low, high))


def multiply_wide(lanes: int, acc: Expr, x: Expr, w: Expr) -> Expr:
    """The same with sums in int32 only, for weights of -128: six instructions instead of four."""
    low, high = _products(x, w)
    return acc + llvm("llvm.aarch64.neon.addp", "int32x4", _pairs("int32x4", low), _pairs("int32x4", high))


def hide(lanes: int, w: Expr) -> Expr:
    """``w`` plus nothing, by an instruction that LLVM does not see through.

    Of a vector that it knows to have equal halves it never takes the high one as it is, for ``smull2``: it rather
    moves down the high half of the other operand, once more for every vector of positions.
    """
    nothing = tirx.Broadcast(tirx.const(0, "int8"), 16)
    return tirx.reinterpret("int32x4", llvm("llvm.aarch64.neon.suqadd", "int8x16", _as_bytes(w), nothing))


def round_to_even(lanes: int, value: Expr) -> Expr:
    """float32 to int32, half to even, in one instruction."""
    return llvm("llvm.aarch64.neon.fcvtns", "int32x4", value)


def narrow_words(lanes: int, first: Expr, second: Expr) -> Expr:
    """Two vectors of int32 to one of int16, saturating."""
    return _joined([llvm("llvm.aarch64.neon.sqxtn", "int16x4", value) for value in (first, second)], 4)


def narrow_to_unsigned(lanes: int, first: Expr, second: Expr) -> Expr:
    """Two vectors of int16 to one of bytes in 0..255, saturating."""
    return _joined([llvm("llvm.aarch64.neon.sqxtun", "int8x8", value) for value in (first, second)], 8)


def narrow_to_signed(lanes: int, first: Expr, second: Expr) -> Expr:
    """Two vectors of int16 to one of bytes in -128..127, saturating."""
    return _joined([llvm("llvm.aarch64.neon.sqxtn", "int8x8", value) for value in (first, second)], 8)


def _dot(name: str, acc: Expr, x: Expr, w: Expr) -> Expr:
    return llvm(name, "int32x4", acc, _as_bytes(x), _as_bytes(w))


def _products(x: Expr, w: Expr) -> tuple[Expr, Expr]:
    """All sixteen as int16, in two vectors."""
    x, w = _as_bytes(x), _as_bytes(w)
    low, high = [[tirx.Shuffle([v], list(range(at, at + 8))) for v in (x, w)] for at in (0, 8)]
    return llvm("llvm.aarch64.neon.smull", "int16x8", *low), llvm("llvm.aarch64.neon.smull", "int16x8", *high)


def _pairs(dtype: str, value: Expr) -> Expr:
    """Sums of neighbours, wider; added to an accumulator it is one ``sadalp``."""
    return llvm("llvm.aarch64.neon.saddlp", dtype, value)


def _as_bytes(value: Expr) -> Expr:
    return tirx.reinterpret("int8x16", value)


def _joined(halves: list[Expr], lanes: int) -> Expr:
    return tirx.Shuffle(halves, list(range(2 * lanes)))
