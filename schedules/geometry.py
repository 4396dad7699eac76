"""Where the positions of a packed tensor lie.

A packed tensor is ``[rows, P, 4]`` in uint8 (a row is four channels) or ``[rows, P, 1]`` in float32 (a row is one
channel); ``P`` runs over *positions*: the pixels of a feature map with its padding in place, or the tokens of a
sequence. One row of pixels and the next share the padding between them, and so do two images of a batch, so the
whole plane is one run of positions in which a kernel tap is a constant shift.

    position(n, h, w) = base + n * image + h * pitch + w
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

LANES = 16  # positions in the widest vector (512 bits of packed words); every plane is cut in multiples of it
CONFLICT = 8 * LANES  # positions


@dataclass(frozen=True)
class Geometry:
    """The placing of ``batch`` maps of ``height`` x ``width`` with at least this padding around each."""

    batch: int
    height: int
    width: int
    pad_h: int = 0
    pad_w: int = 0

    @classmethod
    def of_tokens(cls, count: int) -> Geometry:
        """``count`` positions side by side: the rows of a matrix product."""
        return cls(1, 1, count)

    def normalized(self) -> Geometry:
        """The same places by their usual name: a batch of single pixels lies like tokens."""
        if self.height == self.width == 1 and not self.is_padded:
            return Geometry.of_tokens(self.batch)
        return self

    @property
    def pitch(self) -> int:
        """Positions from a pixel to the one below it."""
        return self.width + self.pad_w

    @property
    def image(self) -> int:
        """Positions from an image of the batch to the next."""
        return (self.height + self.pad_h) * self.pitch

    @property
    def base(self) -> int:
        """The position of the first pixel, on a vector boundary."""
        return _round_up(self.pad_h * self.pitch + self.pad_w)

    @property
    def span(self) -> int:
        """Positions from the first pixel to the last, both included."""
        return (self.batch - 1) * self.image + (self.height - 1) * self.pitch + self.width

    @property
    def positions(self) -> int:
        """``P``: all that is allocated. A single position is not rounded up, so that a vector stays dense.

        Rows a multiple of 512 bytes apart would share few sets of the L1 cache: these are one vector longer.
        """
        if self.span == 1 and not self.is_padded:
            return 1
        end = _round_up(self.base + _round_up(self.span) + self.pad_h * self.pitch + self.pad_w)
        return end if end % CONFLICT else end + LANES

    @property
    def pixels(self) -> int:
        """Positions that hold data."""
        return self.batch * self.height * self.width

    @property
    def is_padded(self) -> bool:
        """Whether the plane has positions that must hold the zero point."""
        return self.pad_h > 0 or self.pad_w > 0

    @cached_property
    def pixel_positions(self) -> np.ndarray:
        """The position of each pixel, int32 ``[batch, height, width]``."""
        n, h, w = np.ogrid[: self.batch, : self.height, : self.width]
        return np.asarray(self.base + n * self.image + h * self.pitch + w, dtype=np.int32)

    @cached_property
    def mask(self) -> np.ndarray:
        """int32 ``[P]``: -1 where a pixel lies, 0 elsewhere."""
        mask = np.zeros(self.positions, np.int32)
        mask[self.pixel_positions.ravel()] = -1
        return mask


@dataclass(frozen=True)
class Window:
    """The taps of a convolution or pooling: kernel, stride, dilation and leading padding, as (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)  # above and to the left; what lies below and right follows from the output size

    def taps(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """For each kernel position, row by row: the stride phase it reads and its shift there, in output pixels."""
        taps = []
        for kh in range(self.kernel[0]):
            for kw in range(self.kernel[1]):
                h = kh * self.dilation[0] - self.padding[0]
                w = kw * self.dilation[1] - self.padding[1]
                taps.append(((h % self.stride[0], w % self.stride[1]), (h // self.stride[0], w // self.stride[1])))
        return taps

    def phases(self) -> list[tuple[int, int]]:
        """The stride phases that some tap reads, in order."""
        return sorted({phase for phase, _ in self.taps()})

    def reach(self, source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
        """The padding (height, width) that the plane which the taps read must have, in output pixels.

        What lies right of a row's last column is also what lies left of the next row: where taps read real pixels
        on the right and padding on the left, the gap must hold both.
        """
        return self._reach_along(0, source[0], target[0]), self._reach_along(1, source[1], target[1])

    def _reach_along(self, axis: int, source: int, target: int) -> int:
        shifts: dict[int, list[int]] = {}
        for phase, shift in self.taps():
            shifts.setdefault(phase[axis], []).append(shift[axis])
        need = 0
        for remainder, along in shifts.items():
            before, after = max(0, -min(along)), max(0, max(along))
            reads_pixels_after = after > 0 and self.stride[axis] * target + remainder < source
            need = max(need, before + after if reads_pixels_after else max(before, after))
        return need


def _round_up(value: int, step: int = LANES) -> int:
    return -(-value // step) * step
