"""What a library is verified against on the box: a stored input, and what every step made of it at compile time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_START, _PRIME, _MASK = 0xCBF29CE484222325, 0x100000001B3, 2**64 - 1  # of FNV-1a


@dataclass(frozen=True)
class Check:
    """A run at compile time, in a workspace that was zero before.

    inputs: the stored input, one contiguous array for each input of the plan
    checksums: for each step, of the bytes that it wrote: its results one after the other, as they lie in memory
    exact: the steps before this number give the same bits on every machine; the number of steps where all do
    outputs: what came out, one contiguous array for each output of the plan
    tolerance: where not all steps are exact, how far floats may be from those of ``outputs``, times the largest
        magnitude in their output; what is no float is the same to the byte

    A library whose steps are all exact need not store ``outputs``: the checksums cover them.
    """

    inputs: tuple[np.ndarray, ...]
    checksums: tuple[int, ...]
    exact: int
    outputs: tuple[np.ndarray, ...]
    tolerance: float


def checksum(*parts: bytes | memoryview) -> int:
    """64 bits of ``parts``, each padded with zeros to whole words of eight bytes (little-endian).

    FNV-1a over words, with the upper half of the product folded into the lower after each one: a product carries
    nothing downwards, so without the fold the highest bits of a word would reach only the highest of the sum.
    """
    value = _START
    for part in parts:
        padded = bytes(part) + bytes(-len(part) % 8)
        for word in np.frombuffer(padded, "<u8").tolist():
            value = (value ^ word) * _PRIME & _MASK
            value ^= value >> 32
    return value
