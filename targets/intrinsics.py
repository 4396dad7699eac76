"""Calls of LLVM's intrinsics from TIR."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.target import codegen

Expr = Any  # tirx.PrimExpr; TVM carries no types


def llvm(name: str, dtype: str, *args: Expr) -> Expr:
    """A call of the LLVM intrinsic ``name``, which gives ``dtype``."""
    number = codegen.llvm_lookup_intrinsic_id(name)
    return tirx.call_llvm_pure_intrin(dtype, tirx.const(number, "uint32"), *args)
