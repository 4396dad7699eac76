"""From PrimFuncs with thread bindings to CUDA C++, and how each of its kernels is launched.

TVM lowers them as for any CUDA target and prints the source; nothing here calls a compiler, so it needs neither nvcc
nor a GPU. The source compiles with nvcc, and with a host compiler against ``runtime/emulation``. Arithmetic is that of
the CPU's kernels: their LLVM intrinsics become the CUDA functions that round alike, and the source must be compiled
with ``-fmad=false`` so that no other products are fused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.ir import Call, GlobalVar, IRModule

from pumice.errors import UnsupportedError
from pumice.targets.cuda_functions import with_cuda_functions

Expr = Any


@dataclass(frozen=True)
class Launch:
    """One kernel of a function: its C symbol, and with what it is launched.

    grid, block: blocks and threads along x, y, z
    shared_bytes: what it needs of dynamic shared memory (kernels here declare theirs in the source: 0)
    arguments: for each of the kernel's pointers, which of the function's arguments it is
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: tuple[int, ...]


@dataclass(frozen=True)
class CudaSource:
    """CUDA C++ text, and for each function the launches that it stands for, in order."""

    text: str
    launches: dict[str, tuple[Launch, ...]]


def cuda_source(functions: Mapping[str, tirx.PrimFunc]) -> CudaSource:
    """The source of ``functions``, each a PrimFunc on tensors of static shape, without results that are allocated.

    Raises UnsupportedError for a function that does more than launch kernels on its arguments, or that TVM cannot
    lower for CUDA.
    """
    try:
        return _lowered(functions)
    except tvm.error.InternalError as error:
        if len(functions) > 1:
            for name, function in functions.items():
                cuda_source({name: function})  # the one that TVM fails on is refused by its name
            raise
        (name,), reason = functions, str(error).strip().splitlines()[-1]
        raise UnsupportedError(
            f"kernel '{name}': TVM cannot make CUDA code of it ({reason}); take its operator out of the model, or "
            "compute it outside"
        ) from error


def _lowered(functions: Mapping[str, tirx.PrimFunc]) -> CudaSource:
    target = tvm.target.Target({"kind": "cuda", "arch": _OLDEST}).with_host("llvm")
    named = {GlobalVar(name): function.with_attr("global_symbol", name) for name, function in functions.items()}
    with tvm.transform.PassContext(opt_level=3, config={"tirx.UnrollLoop": {"explicit_unroll": False}}):
        lowered = tvm.transform.Sequential(_lowering())(tirx.transform.BindTarget(target)(IRModule(named)))
        kernels = {v: f for v, f in lowered.functions_items() if int(f.attrs.get("calling_conv", 0)) == _KERNEL}
        launches = {name: _launches(name, lowered[name]) for name in functions}
        device = tvm.transform.Sequential(_finalizing())(IRModule(kernels))
        device = IRModule({v: with_cuda_functions(f) for v, f in device.functions_items()})
        module = tvm.get_global_func("target.build.cuda")(device, target)
    return CudaSource(_intrinsics() + str(module.inspect_source()), launches)


def _lowering() -> list[tvm.transform.Pass]:
    """TVM's pipeline for schedulable functions up to the cut between host and device."""
    schedulable, plain = s_tir.transform, tirx.transform
    return [
        schedulable.CanonicalizeLoop(),
        schedulable.LowerCrossThreadReduction(),
        schedulable.LowerInitBlock(),
        schedulable.PlanAndUpdateBufferAllocationLocation(),
        schedulable.ConvertBlocksToOpaque(),
        schedulable.LiftThreadBinding(),
        schedulable.CompactBufferAllocation(),
        schedulable.UnifyThreadBinding(),
        schedulable.LowerMatchBuffer(),
        schedulable.StmtSimplify(),
        schedulable.LowerOpaqueBlock(),
        plain.FlattenBuffer(),
        plain.NarrowDataType(32),
        plain.VectorizeLoop(True),
        plain.StorageRewrite(),
        plain.UnrollLoop(),
        plain.StmtSimplify(),
        plain.RemoveNoOp(),
        schedulable.RewriteUnsafeSelect(),
        plain.CommonSubexprElim(),
        plain.VerifyMemory(),
        schedulable.ThreadSync("shared"),
        schedulable.ThreadSync("warp"),
        schedulable.LowerThreadAllreduce(),
        plain.SplitHostDevice(),
    ]


def _finalizing() -> list[tvm.transform.Pass]:
    return [tirx.transform.LowerWarpMemory(), tirx.transform.StmtSimplify(), tirx.transform.LowerIntrin()]


def _launches(name: str, host: tirx.PrimFunc) -> tuple[Launch, ...]:
    """The launches of the host's part of a function; its pointers are followed back to its arguments."""
    place: dict[Any, int] = {argument: i for i, argument in enumerate(host.params)}
    found: list[Launch] = []

    def visit(stmt: tirx.Stmt) -> None:
        if isinstance(stmt, tirx.SeqStmt):
            for part in stmt:
                visit(part)
        elif isinstance(stmt, tirx.DeclBuffer) and _pointed(stmt.data) in place:
            place[stmt.buffer] = place[_pointed(stmt.data)]
        elif isinstance(stmt, tirx.AttrStmt):
            visit(stmt.body)
        elif isinstance(stmt, tirx.Evaluate) and _is_launch(stmt.value):
            found.append(_launch(stmt.value, place))
        elif not isinstance(stmt, tirx.Evaluate):
            raise UnsupportedError(
                f"kernel '{name}': its host part has a {type(stmt).__name__}, and only launches on its arguments can "
                "run on a GPU; bind all of its loops to threads"
            )

    visit(host.body)
    return tuple(found)


def _launch(call: Call, place: Mapping[Any, int]) -> Launch:
    kernel, *rest = call.args
    names = [str(name) for name in call.attrs.launch_params]
    pointers, extents = rest[: len(rest) - len(names)], rest[len(rest) - len(names) :]
    sizes = {name: int(extent) for name, extent in zip(names, extents, strict=True)}
    grid, block = (tuple(sizes.get(f"{kind}.{axis}", 1) for axis in "xyz") for kind in ("blockIdx", "threadIdx"))
    arguments = tuple(place[_pointed(pointer)] for pointer in pointers)
    return Launch(str(kernel.value), grid, block, sizes.get(_DYNAMIC, 0), arguments)  # type: ignore[arg-type]


def _is_launch(value: Expr) -> bool:
    return isinstance(value, Call) and str(getattr(value.op, "name", "")) == "tirx.call_ffi_kernel"


def _pointed(data: Expr) -> Any:
    """The buffer whose pointer ``data`` is."""
    return data.args[0] if isinstance(data, Call) and str(getattr(data.op, "name", "")) == "tirx.buffer_data" else data


def _intrinsics() -> str:
    """What the kernels call beyond CUDA's own, for nvcc; the emulation has its own."""
    text = (resources.files("pumice.targets") / "runtime" / "cuda_intrinsics.h").read_text()
    return re.sub(r"^/\*.*?\*/\n", "", text, count=1, flags=re.DOTALL)


_OLDEST = "sm_75"
_KERNEL = 2  # calling convention of what is launched
_DYNAMIC = "tirx.use_dyn_shared_memory"
