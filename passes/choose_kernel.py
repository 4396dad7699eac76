"""Sparse or dense: which form of a layer's weight is fastest on the target, and why."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pumice.schedules.blocks import QUAD, Blocks, count_blocks, dense_blocks, sparse_blocks
from pumice.schedules.costs import costs_of
from pumice.schedules.gemv import Slices, slice_rows
from pumice.targets.isa import Isa


@dataclass(frozen=True)
class Choice:
    """The weight in its chosen form, the kernel's name for the report, and the reason in a sentence."""

    weight: Blocks | Slices
    kernel: str
    reason: str


def choose_blocks(rows: np.ndarray, isa: Isa) -> Choice:
    """The form of ``rows`` ``[N, taps, C]`` (int8 or float32) for a layer with many positions."""
    dtype = str(rows.dtype)
    costs = costs_of(isa.name, dtype)
    depth = 4 if dtype == "int8" else 1
    total = -(-rows.shape[0] // QUAD) * QUAD * rows.shape[1] * -(-rows.shape[2] // depth)
    single, shared = count_blocks(rows, 1), count_blocks(rows, QUAD) * QUAD
    times = {"dense": total * costs.dense, "1": single * costs.sparse, "4": shared * costs.shared}
    best = min(times, key=lambda form: times[form])
    block, block4 = ("1x4", "4x4") if depth == 4 else ("1x1", "4x1")
    label = f"{dtype} {isa.name}"
    gain = f"{times['dense'] / max(times[best], 1e-9):.1f}x less work time than dense by measured cost"
    if best == "dense":
        reason = _dense_reason(single / total, costs.dense / costs.sparse, block)
        return Choice(dense_blocks(rows), f"dense {label}", reason)
    if best == "1":
        reason = f"{single / total:.0%} of the {block} blocks are there: {gain}"
        return Choice(sparse_blocks(rows, 1), f"sparse {block} {label}", reason)
    reason = f"{shared / total:.0%} of the {block4} blocks are there: {gain}"
    return Choice(sparse_blocks(rows, QUAD), f"sparse {block4} {label}", reason)


def choose_slices(rows: np.ndarray, isa: Isa) -> Choice:
    """The form of ``rows`` ``[N, 1, C]`` for a layer with one position."""
    dtype = str(rows.dtype)
    costs = costs_of(isa.name, dtype)
    dense = slice_rows(rows, isa.lanes, sparse=False)
    sparse = slice_rows(rows, isa.lanes, sparse=True)
    share = sparse.work / dense.work
    label, block = f"{dtype} {isa.name}", "1x4" if dtype == "int8" else "1x1"
    limit = costs.gemv_dense / costs.gemv_sparse
    if share < limit:
        reason = f"{share:.0%} of the entries are there (padding included); sparse pays below {limit:.0%}"
        return Choice(sparse, f"gemv sparse {block} {label}", reason)
    return Choice(dense, f"gemv dense {label}", _dense_reason(share, limit, block))


def _dense_reason(share: float, limit: float, block: str) -> str:
    if share > 0.999:
        return f"no {block} block is zero"
    return f"{share:.0%} of the {block} blocks are there; here sparse pays below {limit:.0%}"
