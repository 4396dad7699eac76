"""A kernel cut into parts that several threads compute side by side, with nothing allocated on the way.

    kernel(x, y):                         kernel(x, y, scratch, task, tasks):
      copy = alloc(4096)                    copy = scratch + 0
      for i in range(64): copy[i] = x[i]    for i in range(64): copy[i] = x[i]      every task for itself
      for i in parallel(10): y[i] = ...  -> for i in range(10 * task // tasks, 10 * (task + 1) // tasks): y[i] = ...

Tasks do not wait for each other inside a kernel. So a kernel is shared if a parallel loop comes last and what stands
before it writes to the kernel's own buffers only; any other is computed by task 0 alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm_ffi
from tvm import DataType, tirx
from tvm.ir import PointerType, PrimType
from tvm.tirx import stmt as nodes

from pumice.targets.plan import align

_STACK = 1024  # bytes from which on TVM would allocate a kernel's own buffer; smaller "global" ones are on the stack


@dataclass(frozen=True)
class TaskKernel:
    """The ``body`` of one task, and the bytes of ``scratch`` that each task needs for itself."""

    body: tirx.Stmt
    scratch: int


def share(body: tirx.Stmt, scratch: tirx.Var, task: tirx.Var, tasks: tirx.Var) -> TaskKernel:
    """The part of ``task`` (int32, 0 .. ``tasks`` - 1) in a lowered kernel; ``scratch`` is this task's own memory."""
    *before, last = list(body) if isinstance(body, tirx.SeqStmt) else [body]
    if _is_parallel(last) and _written(before) <= _allocated(before):
        begin, end = (tirx.truncdiv(last.extent * number, tasks) for number in (task, task + 1))
        part = tirx.For(last.loop_var, last.min + begin, end - begin, tirx.ForKind.SERIAL, last.body)
        shared: tirx.Stmt = tirx.SeqStmt([*before, part]) if before else part
    else:
        shared = tirx.IfThenElse(task == 0, body, None)
    return _without_allocation(tvm_ffi.structural_map(shared, (nodes.For, _in_order)), scratch)


def _is_parallel(stmt: tirx.Stmt) -> bool:
    return isinstance(stmt, nodes.For) and stmt.kind == tirx.ForKind.PARALLEL


def _in_order(loop: nodes.For) -> nodes.For:
    return (
        tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body) if _is_parallel(loop) else loop
    )


def _written(statements: list[tirx.Stmt]) -> set[tirx.Buffer]:
    found: set[tirx.Buffer] = set()
    tvm_ffi.structural_walk(statements, (nodes.BufferStore, lambda store: found.add(store.buffer)))
    return found


def _allocated(statements: list[tirx.Stmt]) -> set[tirx.Buffer]:
    return {stmt.buffer for stmt in statements if isinstance(stmt, nodes.AllocBuffer)}


def _without_allocation(body: tirx.Stmt, scratch: tirx.Var) -> TaskKernel:
    """Large buffers of the kernel's own become places in ``scratch``."""
    used = 0

    def place(alloc: nodes.AllocBuffer) -> tirx.Stmt:
        nonlocal used
        buffer = alloc.buffer
        dtype = DataType(str(buffer.dtype))
        size = dtype.bits * dtype.lanes // 8
        for extent in buffer.shape:
            size *= int(extent)
        if size < _STACK and buffer.scope() == "global":
            return alloc
        offset, used = used, used + align(size)
        start = tirx.reinterpret("uint64", scratch) + tirx.const(offset, "uint64")
        pointer = tirx.Var(f"{buffer.name}_data", PointerType(PrimType(str(buffer.dtype))))
        return tirx.SeqStmt(
            [tirx.Bind(pointer, tirx.reinterpret(pointer.ty, start)), tirx.DeclBuffer(buffer, data=pointer)]
        )

    return TaskKernel(tvm_ffi.structural_map(body, (nodes.AllocBuffer, place)), used)
