"""The compiler pass that says which float products are rounded, and which only as part of a sum.

    acc + x * w  ->  fma(x, w, acc)

Left to itself a compiler fuses such a product into the sum or does not, by its target and version, and the last bit
depends on it. Spelt out, in TVM's kernels as well as in Pumice's, every compiler has to give the same.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import DataType, tirx
from tvm.ir import IRModule

from pumice.schedules import emit
from pumice.schedules.emit import Expr
from pumice.targets.target import Target


@tirx.transform.prim_func_pass(opt_level=0, name="pumice.ContractProducts")
class ContractProducts:
    """Make fused multiply-adds of the float32 sums of products of every kernel, where ``target`` has such instructions.

    Of two products the first is fused. Where there is no instruction the sums stay: each would be a call of libm.
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    def transform_function(self, kernel: tirx.PrimFunc, mod: IRModule, ctx: tvm.transform.PassContext) -> tirx.PrimFunc:
        """The kernel with its sums as fused multiply-adds."""
        return contract(kernel) if self.target.instructions.fuses else kernel


def contract(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
    """``kernel`` with ``fma(a, b, c)`` for ``a * b + c``, ``c + a * b``, ``a * b - c`` and ``c - a * b``.

    What is cut to an integer stays as it is: the coordinates of a resize, by rounding twice, fall on whole numbers.
    """
    return tvm_ffi.structural_mutate(kernel, [(tirx.Cast, _cast), ((tirx.Add, tirx.Sub), _sum)])


def _cast(cast: tirx.Cast, mutator: Any) -> Expr:
    return cast if str(cast.ty).startswith(("int", "uint")) else mutator.default_mutate(cast)


def _sum(total: tirx.Add | tirx.Sub, mutator: Any) -> Expr:
    return _contracted(mutator.default_mutate(total))


def _contracted(total: tirx.Add | tirx.Sub) -> Expr:
    dtype = DataType(str(total.a.ty))
    if not str(dtype).startswith("float32") or not any(isinstance(side, tirx.Mul) for side in (total.a, total.b)):
        return total
    lanes = int(dtype.lanes)
    sign = emit.splat(-1.0, lanes, "float32")
    is_difference = isinstance(total, tirx.Sub)
    if isinstance(total.a, tirx.Mul):
        return emit.fma(total.a.a, total.a.b, total.b * sign if is_difference else total.b, lanes)
    return emit.fma(total.b.a * sign if is_difference else total.b.a, total.b.b, total.a, lanes)
