"""What CUDA C++ needs of a lowered kernel: functions of its own for LLVM's, and names for what is computed.

    y[i] = max(llvm.fma(x[i], 3, 1), 0) * max(llvm.fma(x[i], 3, 1), 0)
    ->  v0 = x[i];  v1 = __fmaf_rn(v0, 3, 1);  v2 = max(v1, 0);  v3 = v2 * v2;  y[i] = v3

The functions round as LLVM's do, correctly, so a GPU gives the same bits. LLVM also finds by itself what is computed
twice; in C source an operand stands in full wherever it is read, and a polynomial that reads its argument twenty times,
where an expression stands that reads its own four times, soon fills pages.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import Call, Expr, TensorLoad
from tvm.target import codegen
from tvm.tirx import stmt as nodes

from pumice.errors import UnsupportedError


def with_cuda_functions(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """``function`` in CUDA's terms; the last pass before its source is printed, for others put named values in place.

    Raises UnsupportedError for one of LLVM's intrinsics that CUDA has no counterpart for.
    """
    return tvm_ffi.structural_map(function, ((Call, _in_cuda), (nodes.BufferStore, _named)))


def _in_cuda(call: Call) -> tirx.Expr:
    if str(getattr(call.op, "name", "")) != "tirx.call_llvm_pure_intrin":
        return call
    number, *arguments = call.args
    name = str(codegen.llvm_get_intrinsic_name(int(number)))
    if name not in _FUNCTIONS:
        raise UnsupportedError(f"LLVM's intrinsic '{name}' has no counterpart in CUDA: the kernel is one for a CPU")
    return tirx.call_pure_extern(call.ty, _FUNCTIONS[name], *arguments)


def _named(store: nodes.BufferStore) -> tirx.Stmt:
    if _guards_a_load(store.value):
        return store
    names: dict[Any, nodes.Bind] = {}

    def name(value: Any) -> Any:
        if not isinstance(value, Expr) or isinstance(value, _PLAIN) or not str(value.ty).startswith("float"):
            return value
        bind = nodes.Bind(tirx.Var(f"v{len(names)}", value.ty), value)
        return names.setdefault(_Key(value), bind).var

    value = tvm_ffi.structural_map(store.value, name)
    return tirx.SeqStmt([*names.values(), nodes.BufferStore(store.buffer, value, store.indices)]) if names else store


def _guards_a_load(value: Any) -> bool:
    """Whether some element may only be read under a condition: it must not get its name before that is tested."""
    found: list[Any] = []

    def load(element: TensorLoad) -> None:
        found.append(element)

    def condition(call: Call) -> None:
        if str(getattr(call.op, "name", "")) == "prim.if_then_else":
            tvm_ffi.structural_walk(call, [(TensorLoad, load)])

    tvm_ffi.structural_walk(value, [(Call, condition)])
    return bool(found)


_Key: Any = tvm_ffi.StructuralKey  # its type stub takes it for a plain record
_PLAIN = (tirx.Var, tirx.FloatImm)
_FUNCTIONS = {
    "llvm.fma": "__fmaf_rn",
    "llvm.sqrt": "__fsqrt_rn",
    "llvm.lrint": "__float2int_rn",
    "llvm.fabs": "fabsf",
    "llvm.copysign": "copysignf",
}
