"""Where the channels of a weight were in the source, once a pass has put them in another order.

Whoever compares a weight with the one of the same name in an earlier module, or in the source, needs to know: a
module attribute says it for the axes of the weight as rows ``[N, taps, C]``: 0, output channels, and 2, input channels.
"""

from __future__ import annotations

import json

import numpy as np
from tvm.ir import IRModule

_ORDERS = "pumice.source_order"

Orders = dict[str, dict[int, np.ndarray]]


def source_orders_of(mod: IRModule) -> Orders:
    """By weight name and axis of its rows, int64 ``[length]``: the index in the source of each index now."""
    stored = json.loads(str(mod.attrs[_ORDERS])) if mod.attrs and _ORDERS in mod.attrs else {}
    return {
        name: {int(axis): np.array(order, np.int64) for axis, order in axes.items()} for name, axes in stored.items()
    }


def with_source_orders(mod: IRModule, orders: Orders) -> IRModule:
    """``mod`` with exactly these orders."""
    plain = {name: {str(axis): order.tolist() for axis, order in axes.items()} for name, axes in orders.items()}
    return mod.with_attr(_ORDERS, json.dumps(plain))


def in_source_order(rows: np.ndarray, orders: dict[int, np.ndarray]) -> np.ndarray:
    """``rows [N, taps, C]`` of a weight with its channels back in the order of the source.

    An axis that has another length than its order, because channels were removed since, stays as it is.
    """
    for axis, order in orders.items():
        if len(order) == rows.shape[axis]:
            rows = rows.take(np.argsort(order), axis)
    return rows
