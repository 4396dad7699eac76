"""A plan whose kernels run on a GPU: each of them bound to blocks and threads, by whoever can.

A kernel that is bound already stays as it is. One that TVM made gets TVM's own schedule for GPUs, and what its parts
hand on between them becomes an argument, which lies in the scratch buffer. Any other was written for a CPU and is
spread.

    mean(x, y): sum = alloc; ..; y = sum / n        ->   mean(x, sum, y), step: mean(input 0, scratch + 0, output 0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import tvm_ffi
from tvm import DataType, s_tir, tirx
from tvm.ir import Call, IRModule
from tvm.s_tir import dlight
from tvm.tirx import stmt as nodes

from pumice.errors import UnsupportedError
from pumice.targets.plan import SCRATCH, Plan, View, align
from pumice.targets.spread import spread
from pumice.targets.target import Target

Argument = TypeVar("Argument")


def gpu_plan(plan: Plan, target: Target) -> tuple[Plan, int]:
    """``plan`` with kernels that ``cuda_source`` takes, and the bytes of scratch that its steps share.

    Raises UnsupportedError for an operator that TVM computes in a function of its own runtime.
    """
    results = {step.kernel: len(step.outputs) for step in plan.steps}
    kernels: dict[str, tirx.PrimFunc] = {}
    places: dict[str, tuple[View, ...]] = {}
    scratch = 0
    for name, kernel in plan.kernels.items():
        kernels[name], between = _on_threads(name, kernel, results[name], target)
        offsets = [0]
        for buffer in between:
            offsets.append(offsets[-1] + align(_bytes(buffer)))
        places[name] = tuple(View(SCRATCH, offset) for offset in offsets[:-1])
        scratch = max(scratch, offsets[-1])
    steps = tuple(
        replace(step, arguments=_inserted(step.arguments, len(step.outputs), places[step.kernel]))
        for step in plan.steps
    )
    return replace(plan, kernels=kernels, steps=steps), scratch


def _on_threads(
    name: str, kernel: tirx.PrimFunc, results: int, target: Target
) -> tuple[tirx.PrimFunc, list[tirx.Buffer]]:
    """``kernel`` on threads, and the arguments that it has got before its ``results``."""
    kinds = _kinds(kernel)
    if "calling" in kinds:
        raise UnsupportedError(
            f"operator '{name}': TVM calls a function of its own runtime for it, as it does where something is sorted, "
            "and there is none on a GPU; take it out of the model, or compute it outside"
        )
    if "bound" in kinds:
        return kernel, []
    if "scheduled" not in kinds:
        return spread(kernel), []
    with target.tvm:
        scheduled = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(IRModule({"main": kernel}))["main"]
    root = scheduled.body.block
    between = list(root.alloc_buffers)
    block = s_tir.SBlock(
        root.iter_vars, root.reads, root.writes, root.name_hint, root.body, annotations=root.annotations
    )
    body = s_tir.SBlockRealize(scheduled.body.iter_values, scheduled.body.predicate, block)
    params = _inserted(list(scheduled.params), results, between)
    return tirx.PrimFunc(params, body, scheduled.ret_type, scheduled.attrs), between


def _kinds(kernel: tirx.PrimFunc) -> set[str]:
    """``bound`` if some loop runs over threads, ``scheduled`` if TVM's schedules can change it, ``calling`` if it
    calls what is no code of its own."""
    found: set[str] = set()

    def loop(stmt: nodes.For) -> None:
        found.update({"bound"} if stmt.kind == tirx.ForKind.THREAD_BINDING else ())

    def attribute(stmt: nodes.AttrStmt) -> None:
        found.update({"bound"} if stmt.attr_key == "thread_extent" else ())

    def block(stmt: s_tir.SBlock) -> None:
        found.add("scheduled")

    def call(expression: Call) -> None:
        found.update({"calling"} if str(getattr(expression.op, "name", "")) == "tirx.tvm_call_packed" else ())

    visits = [(nodes.For, loop), (nodes.AttrStmt, attribute), (s_tir.SBlock, block), (Call, call)]
    tvm_ffi.structural_walk(kernel.body, visits)
    return found


def _inserted(arguments: Sequence[Argument], results: int, more: Sequence[Argument]) -> tuple[Argument, ...]:
    """Results come last."""
    end = len(arguments) - results
    return (*arguments[:end], *more, *arguments[end:])


def _bytes(buffer: tirx.Buffer) -> int:
    dtype = DataType(str(buffer.dtype))
    size = int(dtype.bits) * int(dtype.lanes) // 8
    for extent in buffer.shape:
        size *= int(extent)
    return size
