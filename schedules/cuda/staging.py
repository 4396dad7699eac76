"""What a thread block copies of the input into shared memory, for all kernels with many positions."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.schedules.cuda.tiling import WARP, Slab
from pumice.schedules.emit import Buffer, Expr
from pumice.schedules.geometry import Geometry


@dataclass(frozen=True)
class InputTile:
    """The rows of the input that a tile of the reduction reads: ``tile_rows`` of all ``rows`` that have weights."""

    source: Geometry
    slab: Slab
    rows: int
    tile_rows: int

    def copy(self, x: Buffer, to: Buffer, tile: Expr, position: Expr, warp: Expr, lane: Expr, warps: int) -> None:
        """From ``x`` to ``to``, at the output's ``position``, a warp for each row.

        Beyond the last row and beyond the plane, where no pixel's taps reach, zeros.
        """
        slab, first = self.slab, position + self.slab.lowest
        with T.serial(0, -(-self.tile_rows // warps)) as i, T.unroll(0, -(-slab.pitch // WARP)) as part:
            row, place = i * warps + warp, part * WARP + lane
            source_row, source_place = tile * self.tile_rows + row, first + place
            inside = tirx.all(source_place >= 0, source_place < self.source.positions, source_row < self.rows)
            to_place = row * slab.pitch + place
            with T.If(tirx.all(row < self.tile_rows, place < slab.pitch)), T.Then(), T.If(inside):
                with T.Then():
                    T.buffer_store(to, x[source_row * self.source.positions + source_place], [to_place])
                with T.Else():
                    T.buffer_store(to, tirx.const(0, str(to.dtype)), [to_place])
