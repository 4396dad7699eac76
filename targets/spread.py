"""A CPU kernel spread over the threads of a GPU: what is no product of matrices needs no second kernel.

    for row in parallel(8):                         kernel 1, thread = blockIdx.x * 256 + threadIdx.x:
      for i in range(300): y[row, i] = 0              if thread < 2400: y[thread / 300, thread % 300] = 0
      for h in range(14):                      ->   kernel 2:
        for w in range(14):                           if thread < 1568: y[thread / 196, ..] = x[thread / 196, ..]
          y[row, 20 + h * 16 + w] = x[row, ..]

The kernel must be emitted for vectors of one lane. A loop is shared out if its steps may run in any order: if all that
they store goes to arguments, or to buffers of their own. (A kernel sums up in buffers of its own and never in its
arguments, which makes that enough.) Such loops are nested as far as they go, and each step of the innermost is a
thread; the last loop runs fastest, so neighbours touch neighbouring words. What stands one after the other, in such a
loop or outside of all, becomes kernels that run one after the other, unless it hands on values in buffers of the
kernel's own: then one thread does it all, as each row of a softmax, which is the whole kernel where there is one row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import tvm_ffi
from tvm import tirx
from tvm.tirx import stmt as nodes

THREADS = 256  # of a block


def spread(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
    """``kernel`` with its loops bound to blocks and threads, as one or more launches in order."""
    parts = _parts(kernel.body)
    views = [stmt for stmt in parts if isinstance(stmt, nodes.DeclBuffer)]
    arguments = {*kernel.params, *(view.buffer for view in views)}
    work = _sequence(parts[len(views) :])
    launches = [nest.on_threads() for nest in _nests(work, _Nest((), (), work), arguments)]
    return kernel.with_body(_sequence([*views, *launches]))


@dataclass(frozen=True)
class _Nest:
    """Loops whose steps may run in any order, around ``body``, which runs where all of ``guards`` hold."""

    loops: tuple[nodes.For, ...]
    guards: tuple[tirx.Expr, ...]
    body: tirx.Stmt

    def on_threads(self) -> tirx.Stmt:
        """A thread for each step."""
        steps = math.prod(int(loop.extent) for loop in self.loops)
        threads = min(THREADS, -(-steps // _WARP) * _WARP)
        block, lane = (tirx.Var(name, "int32") for name in ("block", "lane"))
        thread = block * threads + lane
        values, below = {}, 1
        for loop in reversed(self.loops):
            extent = int(loop.extent)
            values[loop.loop_var] = loop.min + tirx.floormod(tirx.floordiv(thread, below), extent)
            below *= extent
        guards = [*([thread < steps] if steps % threads else []), *self.guards]
        body = _in_registers(self.body)
        if guards:
            body = tirx.IfThenElse(tirx.all(*guards), body, None)
        body = tvm_ffi.structural_map(body, (tirx.Var, lambda var: values.get(var, var)))
        return _bound(block, -(-steps // threads), "blockIdx.x", _bound(lane, threads, "threadIdx.x", body))


def _nests(stmt: tirx.Stmt, outer: _Nest, arguments: set[tirx.Buffer]) -> list[_Nest]:
    """What ``stmt`` does in every step of ``outer``, as nests of their own, in order."""
    if not _has_nest(stmt, arguments):
        return [replace(outer, body=stmt)]
    if isinstance(stmt, nodes.For):
        return _nests(stmt.body, replace(outer, loops=(*outer.loops, stmt)), arguments)
    if isinstance(stmt, nodes.IfThenElse):
        cases = [(stmt.condition, stmt.then_case), (tirx.Not(stmt.condition), stmt.else_case)]
        guarded = [(replace(outer, guards=(*outer.guards, guard)), case) for guard, case in cases if case is not None]
        return [nest for guard, case in guarded for nest in _nests(case, guard, arguments)]
    return [nest for part in stmt for nest in _nests(part, outer, arguments)]


def _has_nest(stmt: tirx.Stmt | None, arguments: set[tirx.Buffer]) -> bool:
    """Whether ``stmt`` is a loop that can be shared out, or statements with nothing but the arguments in common."""
    if isinstance(stmt, nodes.For):
        return isinstance(stmt.extent, tirx.IntImm) and _stored(stmt) - _allocated(stmt) <= arguments
    if isinstance(stmt, nodes.IfThenElse):
        return _has_nest(stmt.then_case, arguments) or _has_nest(stmt.else_case, arguments)
    is_plain = not any(isinstance(part, nodes.AllocBuffer | nodes.Bind) for part in _parts(stmt))
    return isinstance(stmt, tirx.SeqStmt) and is_plain and any(_has_nest(part, arguments) for part in stmt)


def _parts(stmt: tirx.Stmt | None) -> list[tirx.Stmt]:
    return list(stmt) if isinstance(stmt, tirx.SeqStmt) else [stmt]


def _sequence(parts: list[tirx.Stmt]) -> tirx.Stmt:
    return tirx.SeqStmt(parts) if len(parts) > 1 else parts[0]


def _stored(stmt: tirx.Stmt) -> set[tirx.Buffer]:
    found: set[tirx.Buffer] = set()
    tvm_ffi.structural_walk(stmt, (nodes.BufferStore, lambda store: found.add(store.buffer)))
    return found


def _allocated(stmt: tirx.Stmt) -> set[tirx.Buffer]:
    found: set[tirx.Buffer] = set()
    tvm_ffi.structural_walk(stmt, (nodes.AllocBuffer, lambda alloc: found.add(alloc.buffer)))
    return found


def _in_registers(stmt: tirx.Stmt) -> tirx.Stmt:
    """A thread's own buffers in its own memory, without the hints (prefetches) for a CPU's caches."""
    local = {b: tirx.decl_buffer(b.shape, b.dtype, b.name, scope="local") for b in _allocated(stmt)}
    stmt = tvm_ffi.structural_map(stmt, (nodes.Evaluate, lambda hint: nodes.Evaluate(tirx.const(0, "int32"))))
    return tvm_ffi.structural_map(stmt, (tirx.Var, lambda var: local.get(var, var)))


def _bound(var: tirx.Var, extent: int, tag: str, body: tirx.Stmt) -> tirx.Stmt:
    axis = tirx.IterVar(None, tirx.Var(tag, "int32"), _THREAD_INDEX, tag)
    return tirx.For(var, 0, extent, tirx.ForKind.THREAD_BINDING, body, axis)


_WARP = 32
_THREAD_INDEX = 1  # tirx.IterVar's code for it
