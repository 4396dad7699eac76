"""An instrument that checks after every pass that no pruned weight came back, and that the module is well formed."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst, IRModule

from pumice.errors import ModelError
from pumice.module import source_of, weight_vars_of
from pumice.passes.numpy_operators import MOVES, move
from pumice.passes.rewriting import op_name
from pumice.passes.source_order import in_source_order, source_orders_of

_LAYERS = {"relax.matmul", "relax.nn.conv1d", "relax.nn.conv2d", "relax.nn.conv3d"}
# What may stand between a weight and its layer. Anything else is an activation, whose whole past nobody needs to walk.
_FOLLOWED = {"multiply", "divide", "dequantize", "astype", *MOVES}
_ORIGINAL = "_orig"  # torch.nn.utils.prune's name for a weight before its mask


@tvm.ir.instrument.pass_instrument
class NoPrunedWeightCameBack:
    """``with tvm.transform.PassContext(instruments=[NoPrunedWeightCameBack()]): ...``.

    After every pass on a module in Pumice's form, the weight of each layer is compared with the weight of the same
    name before the pass: what was zero must be zero. Compared is what the layer multiplies by, as rows: so a mask
    that is multiplied in, a transposition that moves into the weight, a conv1d that turns conv2d and a weight that
    turns int8 are all seen through, and channels that a pass put in another order, and said so, are compared in that of
    the source. Biases are no weights in this sense. Weights whose tensor is the same object
    as before cost nothing. Raises ModelError that names the pass and the weight, and for a malformed module.
    """

    def __init__(self) -> None:
        self._before: list[IRModule] = []

    def run_before_pass(self, mod: IRModule, info: Any) -> None:
        """Remember the module: its weights are immutable, so this copies nothing."""
        self._before.append(mod)

    def run_after_pass(self, mod: IRModule, info: Any) -> None:
        """Compare."""
        before = self._before.pop()
        if not (_is_graph(before) and _is_graph(mod)):
            return
        try:
            relax.analysis.well_formed(mod)
        except Exception as error:
            raise ModelError(f"{source_of(mod)}: the pass {info.name} left a malformed module: {error}") from error
        changed = _changed(before, mod)
        if not changed:
            return
        zeros_before = _layer_zeros(before, changed)
        zeros_after = _layer_zeros(mod, changed)
        for name, zero in zeros_before.items():
            now = zeros_after.get(name)
            if now is None or now.shape != zero.shape:
                continue  # the layer went, or was split or merged: nothing to compare with
            back = int((zero & ~now).sum())
            if back:
                raise ModelError(
                    f"{source_of(mod)}: the pass {info.name} made {back} of {int(zero.sum())} zero weights of {name} "
                    "nonzero, so pruned weights came back"
                )


def _is_graph(mod: IRModule) -> bool:
    """Whether the module carries weights and is still a graph (not lowered to the virtual machine's form)."""
    if not (mod.attrs and "pumice.weights" in mod.attrs) or "main" not in [g.name_hint for g in mod.get_global_vars()]:
        return False
    main = mod["main"]
    return isinstance(main, relax.Function) and any(isinstance(b, relax.DataflowBlock) for b in main.body.blocks)


def _changed(before: IRModule, after: IRModule) -> set[str]:
    """The weights, under their final names, whose tensor is not the very one that it was."""
    old, new = before.attrs["pumice.weights"], after.attrs["pumice.weights"]
    return {_plain(str(name)) for name, tensor in new.items() if name not in old or not tensor.same_as(old[name])}


def _plain(name: str) -> str:
    return name.removesuffix(_ORIGINAL)


def _layer_zeros(mod: IRModule, names: set[str]) -> dict[str, np.ndarray]:
    """Where the weight of each layer is zero, as ``[N, taps, C]``, by the weight's name."""
    stored = mod.attrs["pumice.weights"]
    sources = {var: var.name for var in weight_vars_of(mod) if var.name in stored}
    bound = {b.var: b.value for block in mod["main"].body.blocks for b in block.bindings}
    orders = source_orders_of(mod)
    zeros: dict[str, np.ndarray] = {}
    for value in bound.values():
        if op_name(value) not in _LAYERS:
            continue
        name = _source_name(value.args[1], bound, sources)
        if name in names and name not in zeros:
            zero = _zeros(value.args[1], bound, sources, stored)
            if zero is not None:
                zeros[name] = in_source_order(_rows(zero, op_name(value)), orders.get(name, {}))
    return zeros


def _rows(zero: np.ndarray, operator: str) -> np.ndarray:
    if operator == "relax.matmul":
        return np.swapaxes(zero, -1, -2).reshape(-1, 1, zero.shape[-2])
    return zero.reshape(*zero.shape[:2], -1).transpose(0, 2, 1)


def _source_name(expr: relax.Expr, bound: dict[Any, Any], sources: dict[Any, str]) -> str:
    """The name of the largest weight that an operand is computed from."""
    if expr in sources:
        return _plain(sources[expr])
    value = bound.get(expr) if isinstance(expr, relax.Var) else None
    if value is None or op_name(value).removeprefix("relax.") not in _FOLLOWED:
        return ""
    return next((n for n in (_source_name(a, bound, sources) for a in value.args) if n), "")


def _zeros(expr: relax.Expr, bound: dict[Any, Any], sources: dict[Any, str], stored: Any) -> np.ndarray | None:
    """Where an operand that is computed from weights is zero for certain; None where that cannot be told."""
    if expr in sources:
        return np.asarray(np.from_dlpack(stored[sources[expr]]) == 0)
    if isinstance(expr, GenericConst):
        return np.asarray(expr.value.numpy() == 0) if isinstance(expr.ty, relax.TensorType) else None
    value = bound.get(expr) if isinstance(expr, relax.Var) else None
    operator = op_name(value).removeprefix("relax.")
    if value is None or operator not in _FOLLOWED:
        return None
    data = _zeros(value.args[0], bound, sources, stored)
    if data is None:
        return None
    if operator == "multiply":
        other = _zeros(value.args[1], bound, sources, stored)
        return None if other is None else data | other
    if operator == "dequantize":
        zero_point = _zeros(value.args[2], bound, sources, stored)
        return data if zero_point is not None and zero_point.all() else None
    if operator in ("astype", "divide"):
        return data
    moved = move(value, data)
    return None if moved is None else np.asarray(moved)
