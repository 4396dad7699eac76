"""From a plan to machine code: TVM's lowering of each kernel, one entry that calls them, LLVM.

    pumice_run(buffers, first, last)      int32 pumice_run(void **buffers, int32 first, int32 last)
        if first <= 0 < last: pack(buffers[2] + 0, buffers[1] + 0)
        if first <= 1 < last: layer_conv1(buffers[1] + 0, buffers[0] + 0, ...)

The entry runs the steps from ``first`` up to but without ``last``: all of them, or a single one to time it. It gives
0, or -1 when memory or threads ran out. Nothing is allocated, checked or looked up between the steps.
"""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.ir import Call, GlobalVar, IRModule, PointerType, PrimType
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from pumice.targets.plan import ALIGNMENT, FIRST_INPUT, Plan, View
from pumice.targets.target import Target

ENTRY = "pumice_run"

_C_CALL = -1  # a calling convention that MakePackedAPI leaves alone: plain arguments
_CPU = 1  # kDLCPU
# noalias: of all functions of a module, TVM's code generator asks the last one only.
_ATTRIBUTES = {"global_symbol": ENTRY, "tirx.noalias": True}


def build(plan: Plan, target: Target) -> tvm.runtime.Module:
    """Compile ``plan`` into a module with the function ``pumice_run``, which is also a C symbol."""
    device = target.tvm.with_host(target.tvm)
    names = {name: GlobalVar(name) for name in plan.kernels}
    pipeline, finalize, _ = tirx.get_default_tir_pipeline(target.tvm)
    with tvm.transform.PassContext(opt_level=3):
        kernels = IRModule({names[n]: f.with_attr("global_symbol", n) for n, f in plan.kernels.items()})
        kernels = pipeline(tirx.transform.BindTarget(device)(kernels))
        functions = {name: _called_directly(function) for name, function in kernels.functions_items()}
        entry = GlobalVar(f"{ENTRY}_steps")
        functions[entry] = _entry(plan, names).with_attr("target", target.tvm)
        packed = IRModule({GlobalVar(ENTRY): _packed(entry).with_attr("target", device)})
        functions |= dict(tirx.transform.MakePackedAPI()(packed).functions_items())
        module = finalize()(IRModule(functions))
        return tvm.get_global_func("target.build.llvm")(module, target.tvm)


def _called_directly(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
    """A kernel as TVM lowered it, taking bare pointers instead of tensors whose every property it checks.

    The body stays in a scope of its own: LLVM makes that a function which is never inlined and whose arguments do
    not alias.
    """
    declared: list[tirx.DeclBuffer] = []
    body = _compute_scope(kernel.body, declared)
    assert body is not None
    pointers = [tirx.Var(f"{d.buffer.name}_data", PointerType(PrimType(str(d.buffer.dtype)))) for d in declared]
    views = [tirx.DeclBuffer(d.buffer, data=pointer) for d, pointer in zip(declared, pointers, strict=True)]
    body = tirx.SeqStmt([*views, body])
    for view in views:
        body = tirx.AttrStmt(view.buffer, "storage_alignment", _int(ALIGNMENT), body)
    body = tirx.AttrStmt("default", "device_type", _int(_CPU), body)
    body = tirx.AttrStmt("default", "device_id", _int(0), body)
    function = tirx.PrimFunc(pointers, body, PrimType("int32"))
    return function.with_attr({"target": kernel.attrs["target"], "tirx.noalias": True})


def _compute_scope(stmt: tirx.Stmt, declared: list[tirx.DeclBuffer]) -> tirx.Stmt | None:
    """What a lowered kernel computes, below the checks of its arguments; ``declared`` gets the arguments."""
    if isinstance(stmt, tirx.DeclBuffer):
        declared.append(stmt)
    if isinstance(stmt, tirx.AttrStmt):
        return stmt if stmt.attr_key == "compute_scope" else _compute_scope(stmt.body, declared)
    if isinstance(stmt, tirx.SeqStmt):
        return next((found for part in stmt if (found := _compute_scope(part, declared)) is not None), None)
    return None


def _entry(plan: Plan, names: dict[str, GlobalVar]) -> tirx.PrimFunc:
    buffers = FIRST_INPUT + len(plan.inputs) + len(plan.outputs)
    with IRBuilder() as builder, T.prim_func():
        T.func_name(ENTRY)
        T.func_attr({**_ATTRIBUTES, "calling_conv": _C_CALL})
        handle, first, last = T.arg("buffers", T.handle()), T.arg("first", T.int32()), T.arg("last", T.int32())
        T.func_ret(PrimType("int32"))
        table = T.decl_buffer((buffers,), "uint64", data=handle)

        def pointer(view: View) -> tirx.Expr:
            return T.reinterpret(T.handle().ty, table[view.buffer] + tirx.const(view.offset, "uint64"))

        for number, step in enumerate(plan.steps):
            call = Call(names[step.kernel], [pointer(view) for view in step.arguments], ret_ty="int32")
            with T.If(tirx.all(first <= number, last > number)), T.Then():
                _call(call)
    return builder.get()


def _packed(entry: GlobalVar) -> tirx.PrimFunc:
    """The entry as TVM's runtime calls it."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name(ENTRY)
        T.func_attr(_ATTRIBUTES)
        arguments = [T.arg("buffers", T.handle()), T.arg("first", T.int32()), T.arg("last", T.int32())]
        T.func_ret(PrimType("int32"))
        _call(Call(entry, arguments, ret_ty="int32"))
    return builder.get()


def _call(call: Call) -> None:
    """Call, and give up where that fails: TVM's runtime has kept the reason."""
    with T.If(call != 0), T.Then():
        T.evaluate(T.tvm_throw_last_error())


def _int(value: int) -> tirx.Expr:
    return tirx.const(value, "int32")
