"""From a plan to machine code: TVM's lowering of each kernel, one entry that calls them, LLVM.

    int32 pumice_steps(void **buffers, int32 first, int32 last, int32 task, int32 tasks)
        for step in first .. min(last, number of steps)
            if step == 0: pack(buffers[3] + 0, buffers[1] + 0, scratch, task, tasks)
            if step == 1: layer_conv1(buffers[1] + 0, buffers[0] + 0, ..., scratch, task, tasks)

Several threads run one plan together: each calls the entry for every step with a ``task`` of its own, waits for the
others, and goes on to the next step. A kernel's outermost loop, where it is parallel, is cut into as many parts as
there are tasks; a kernel without one is run by task 0. So no thread is started and nothing is handed over within a
plan, and whoever calls brings the threads. Nothing is allocated, checked or looked up between the steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tvm
from tvm import tirx
from tvm.ir import Call, GlobalVar, IRModule, PointerType, PrimType
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from pumice.errors import UnsupportedError
from pumice.targets.plan import ALIGNMENT, FIRST_INPUT, SCRATCH, Plan, View
from pumice.targets.target import Target
from pumice.targets.tasks import share

ENTRY = "pumice_steps"

_TVM_HOOK = re.compile(rb"\0__(TVM\w+)\0")  # a symbol's name

_C_CALL = -1  # a calling convention that MakePackedAPI leaves alone: plain arguments
_CPU = 1  # kDLCPU
# noalias: of all functions of a module, TVM's code generator asks the last one only.
_ATTRIBUTES = {"global_symbol": ENTRY, "tirx.noalias": True}


@dataclass(frozen=True)
class Code:
    """What was compiled: ``module`` with the function ``pumice_steps``, and what a caller must bring.

    scratch: bytes that each task needs for itself while it runs a step.
    """

    module: tvm.runtime.Module
    scratch: int

    def write(self, folder: Path) -> list[str]:
        """Write what is linked into a library into ``folder``; the files' names.

        Raises UnsupportedError where a kernel calls TVM's runtime, through a pointer that nobody would fill in.
        """
        code = folder / "code.o"
        self.module.write_to_file(str(code))
        hook = _TVM_HOOK.search(code.read_bytes())
        if hook:
            raise UnsupportedError(
                f"an operator of the model was compiled into a call of TVM's runtime ({hook[1].decode()}), which a "
                "library does without; find it among those that are not layers, and take it out or compute it outside"
            )
        return [code.name]


def build(plan: Plan, target: Target, for_tvm: bool = True) -> Code:
    """Compile ``plan``. The entry is a C symbol; ``for_tvm`` makes it a function of TVM's runtime too."""
    device = target.tvm.with_host(target.tvm)
    names = {name: GlobalVar(name) for name in plan.kernels}
    pipeline, finalize, _ = tirx.get_default_tir_pipeline(target.tvm)
    with tvm.transform.PassContext(opt_level=3):
        kernels = IRModule({names[n]: f.with_attr("global_symbol", n) for n, f in plan.kernels.items()})
        kernels = pipeline(tirx.transform.BindTarget(device)(kernels))
        bare = _callers_arguments(plan)
        parts = {name: _Part.of(function, bare[name.name_hint]) for name, function in kernels.functions_items()}
        functions = {name: part.function for name, part in parts.items()}
        entry = GlobalVar(f"{ENTRY}_c")
        functions[entry] = _entry(plan, names).with_attr("target", target.tvm)
        if for_tvm:
            packed = IRModule({GlobalVar(ENTRY): _packed(entry).with_attr("target", device)})
            functions |= dict(tirx.transform.MakePackedAPI()(packed).functions_items())
        module = finalize()(IRModule(functions))
        compiled = tvm.get_global_func("target.build.llvm")(module, target.tvm)
    return Code(compiled, max((part.scratch for part in parts.values()), default=0))


@dataclass(frozen=True)
class _Part:
    """A kernel that computes one task's part, ``function(arguments..., scratch, task, tasks)``."""

    function: tirx.PrimFunc
    scratch: int

    @classmethod
    def of(cls, kernel: tirx.PrimFunc, bare: set[int]) -> _Part:
        """A kernel as TVM lowered it, taking bare pointers instead of tensors whose every property it checks.

        The body stays in a scope of its own: LLVM makes that a function which is never inlined and whose arguments
        do not alias. All but the ``bare`` arguments are promised to be aligned.
        """
        declared: list[tirx.DeclBuffer] = []
        scope = _compute_scope(kernel.body, declared)
        assert scope is not None
        pointers = [tirx.Var(f"{d.buffer.name}_data", PointerType(PrimType(str(d.buffer.dtype)))) for d in declared]
        scratch, task, tasks = tirx.Var("scratch", "handle"), tirx.Var("task", "int32"), tirx.Var("tasks", "int32")
        shared = share(scope.body, scratch, task, tasks)
        views = [tirx.DeclBuffer(d.buffer, data=pointer) for d, pointer in zip(declared, pointers, strict=True)]
        body = tirx.SeqStmt([*views, tirx.AttrStmt(scope.node, scope.attr_key, scope.value, shared.body)])
        for number, view in enumerate(views):
            if number not in bare:
                body = tirx.AttrStmt(view.buffer, "storage_alignment", _int(ALIGNMENT), body)
        body = tirx.AttrStmt("default", "device_type", _int(_CPU), body)
        body = tirx.AttrStmt("default", "device_id", _int(0), body)
        function = tirx.PrimFunc([*pointers, scratch, task, tasks], body, PrimType("int32"))
        return cls(function.with_attr({"target": kernel.attrs["target"], "tirx.noalias": True}), shared.scratch)


def _callers_arguments(plan: Plan) -> dict[str, set[int]]:
    """For each kernel the arguments that are an input or an output in some step: the caller's memory lies anyhow."""
    found: dict[str, set[int]] = {name: set() for name in plan.kernels}
    for step in plan.steps:
        found[step.kernel] |= {i for i, view in enumerate(step.arguments) if view.buffer >= FIRST_INPUT}
    return found


def _compute_scope(stmt: tirx.Stmt, declared: list[tirx.DeclBuffer]) -> tirx.AttrStmt | None:
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
        handle, first, last, task, tasks = _entry_arguments()
        T.func_ret(PrimType("int32"))
        table = T.decl_buffer((buffers,), "uint64", data=handle)

        def pointer(view: View) -> tirx.Expr:
            return T.reinterpret(T.handle().ty, table[view.buffer] + tirx.const(view.offset, "uint64"))

        def call(number: int) -> None:
            step = plan.steps[number]
            arguments = [*map(pointer, step.arguments), pointer(View(SCRATCH)), task, tasks]
            T.evaluate(Call(names[step.kernel], arguments, ret_ty="int32"))

        with T.serial(first, tirx.min(last, tirx.const(len(plan.steps), "int32"))) as step:
            _choose(step, 0, len(plan.steps), call)
    return builder.get()


def _choose(step: tirx.Var, first: int, last: int, call: Callable[[int], None]) -> None:
    """``call(step)`` by halving ``first`` .. ``last`` - 1."""
    if last - first < 2:
        if last > first:
            call(first)
        return
    middle = (first + last) // 2
    with T.If(step < middle):
        with T.Then():
            _choose(step, first, middle, call)
        with T.Else():
            _choose(step, middle, last, call)


def _packed(entry: GlobalVar) -> tirx.PrimFunc:
    """The entry as TVM's runtime calls it."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name(ENTRY)
        T.func_attr(_ATTRIBUTES)
        arguments = _entry_arguments()
        T.func_ret(PrimType("int32"))
        T.evaluate(Call(entry, arguments, ret_ty="int32"))
    return builder.get()


def _entry_arguments() -> list[tirx.Var]:
    return [T.arg("buffers", T.handle()), *(T.arg(name, T.int32()) for name in ("first", "last", "task", "tasks"))]


def _int(value: int) -> tirx.Expr:
    return tirx.const(value, "int32")
