"""Sparse or dense: which form of a layer's weight is fastest on the target, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pumice.passes.layers import Layer
from pumice.passes.rewriting import shape_of
from pumice.schedules.blocks import QUAD, Blocks, count_blocks, dense_blocks, expand_groups, sparse_blocks
from pumice.schedules.costs import costs_of
from pumice.schedules.gemv import Slices, slice_rows
from pumice.targets.isa import Isa


@dataclass(frozen=True)
class Choice:
    """The weight in its chosen form, the kernel's name for the report, and the reason in a sentence."""

    weight: Blocks | Slices
    kernel: str
    reason: str


def preview(layer: Layer, weight: np.ndarray, isa: Isa) -> Choice:
    """What would be chosen for a float ``weight`` once it is int8: what is zero now is zero then."""
    rows = (layer.to_rows(weight) != 0).astype(np.int8)
    groups = int(layer.call.attrs.groups) if layer.operator == "conv2d" else 1
    positions = math.prod(shape_of(layer.var)) // len(rows)
    expanded = expand_groups(rows, groups)
    return choose_slices(expanded, isa) if positions == 1 and rows.shape[1] == 1 else choose_blocks(expanded, isa)


def choose_blocks(rows: np.ndarray, isa: Isa) -> Choice:
    """The form of ``rows`` ``[N, taps, C]`` (int8 or float32) for a layer with many positions."""
    dtype = str(rows.dtype)
    costs = costs_of(isa.name, dtype)
    depth = 4 if dtype == "int8" else 1
    total = -(-rows.shape[0] // QUAD) * QUAD * rows.shape[1] * -(-rows.shape[2] // depth)
    single, shared = count_blocks(rows, 1), count_blocks(rows, QUAD) * QUAD
    times = {"dense": total * costs.dense, "1": single * costs.sparse, "4": shared * costs.shared}
    best = min(times, key=lambda form: times[form])
    label = f"{dtype} {isa.name}"
    if best == "dense":
        reason = _dense_reason(single / total, costs.dense / costs.sparse, depth)
        return Choice(dense_blocks(rows), f"dense {label}", reason)
    per_list, left = (1, single) if best == "1" else (QUAD, shared)
    form = f"{per_list}x{depth}"
    faster = times["dense"] / max(times[best], 1e-9)
    limit = costs.dense / (costs.sparse if best == "1" else costs.shared)
    reason = (
        f"{left / total:.0%} of its {form} blocks are left; here sparse pays below {limit:.0%}: "
        f"{faster:.1f} times as fast as dense by the cost table"
    )
    return Choice(sparse_blocks(rows, per_list), f"sparse {form} {label}", reason)


def choose_slices(rows: np.ndarray, isa: Isa) -> Choice:
    """The form of ``rows`` ``[N, 1, C]`` for a layer with one position."""
    dtype = str(rows.dtype)
    costs = costs_of(isa.name, dtype)
    dense = slice_rows(rows, isa.lanes, sparse=False)
    sparse = slice_rows(rows, isa.lanes, sparse=True)
    share = sparse.work / dense.work
    label, depth = f"{dtype} {isa.name}", 4 if dtype == "int8" else 1
    limit = costs.gemv_dense / costs.gemv_sparse
    if share < limit:
        reason = f"{share:.0%} of its entries are left, padding included; here sparse pays below {limit:.0%}"
        return Choice(sparse, f"gemv sparse 1x{depth} {label}", reason)
    return Choice(dense, f"gemv dense {label}", _dense_reason(share, limit, depth))


def _dense_reason(share: float, limit: float, depth: int) -> str:
    if share > 0.999:
        return f"none of its 1x{depth} blocks is zero" if depth > 1 else "none of its weights is zero"
    return f"{share:.0%} of its 1x{depth} blocks are left, padding included; here sparse pays below {limit:.0%}"
