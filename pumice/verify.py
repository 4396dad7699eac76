"""The check that a library carries: made by running it when it is compiled, compared where it runs.

    stored input -> step 0 -> checksum of what it wrote -> step 1 -> checksum of what it wrote -> ... -> outputs

The compiled code itself runs, if this machine can. For another CPU or a GPU its twin does: the same plan lowered once
more, with that device's vectors, tiles and layouts, but plain arithmetic in place of its instructions, so that every
byte that a step writes is the same. What CPUs and C libraries compute differently ends the checksums, see
``exact_steps``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tvm_ffi
from tvm import tirx
from tvm.ir import Call, IRModule, Op
from tvm.target.codegen import llvm_get_intrinsic_name

from pumice.passes.calibrate import Samples
from pumice.passes.link_steps import link_steps
from pumice.passes.pipeline import LowerOptions, lower
from pumice.targets.build import Code, build
from pumice.targets.build_cuda import CudaCode
from pumice.targets.check import Check, checksum
from pumice.targets.plan import SCRATCH, WEIGHTS, WORKSPACE, Plan, Spec, View, aligned
from pumice.targets.target import Target
from pumice.targets.toolchain import find_toolchain

# Of the largest number of an output: an error in the last place of a function may turn the rounding to int8 of a few
# values, which is what this allows for, where a wrong weight or instruction moves whole layers.
TOLERANCE = 0.02

# What LLVM calls a C library for, which C libraries compute to within an error of their own.
_LIBM = {"exp", "exp2", "exp10", "log", "log2", "log10", "log1p", "pow", "erf", "sigmoid", "cbrt", "hypot"}
_LIBM |= {f"{arc}{name}{h}" for arc in ("", "a") for name in ("sin", "cos", "tan") for h in ("", "h")} | {"atan2"}


def make_check(
    mod: IRModule,
    target: Target,
    options: LowerOptions,
    plan: Plan,
    code: Code | CudaCode,
    samples: Mapping[str, np.ndarray] | None = None,
) -> Check:
    """The check of a library, on the first of the calibration ``samples``, or on noise where there are none.

    ``plan`` is what ``mod`` was lowered to for ``target`` with ``options``, and ``code`` what ``build`` made of it.
    """
    inputs = _example(plan.inputs) if samples is None else list(next(iter(Samples(mod, samples))).values())
    exact = exact_steps(plan, target)
    if not target.runs_here:
        plan, code = _twin(mod, target.twin(), options, plan)
        exact = min(exact, exact_steps(plan, target))
    assert isinstance(code, Code)
    run = _Run(plan, code, inputs)
    checksums = tuple(run.step(number) for number in range(len(plan.steps)))
    return Check(tuple(run.inputs), checksums, exact, tuple(run.outputs), TOLERANCE)


def exact_steps(plan: Plan, target: Target) -> int:
    """How many steps from the first on give the same bits on ``target`` as here.

    A step that calls a function of the C library ends them, or one by which a GPU's threads add up floats, in an order
    of their own. So does, where a twin runs in the code's place, a float
    sum with a product that compilers are left to round, see ``ContractProducts``: once, with the product fused into it,
    or twice.
    """
    inexact = {name for name, kernel in plan.kernels.items() if _is_inexact(kernel, target)}
    return next((number for number, step in enumerate(plan.steps) if step.kernel in inexact), len(plan.steps))


def _may_round_otherwise(target: Target) -> bool:
    """Whether a sum with a product that is not spelt out may have another last bit on ``target`` than here.

    The same code has not. Of two compilers at most one may fuse the product, or each another one of several.
    """
    return not target.runs_here and (_fuses(target) or _fuses(Target.parse("native")))


def _fuses(target: Target) -> bool:
    """Whether the code has fused multiply-adds that nobody asked for; nvcc is told not to."""
    return target.kind == "cpu" and (target.architecture == "aarch64" or "fma" in target.features)


def _example(inputs: Sequence[Spec]) -> list[np.ndarray]:
    """Standard normal floats, the same every time; zeros for integers, which may be indices."""
    draw = np.random.default_rng(0)
    return [
        draw.standard_normal(shape).astype(dtype) if np.dtype(dtype).kind == "f" else np.zeros(shape, dtype)
        for shape, dtype in inputs
    ]


def _twin(mod: IRModule, here: Target, options: LowerOptions, plan: Plan) -> tuple[Plan, Code]:
    twin = link_steps(lower(mod, here, options))
    places = [[(step.results, step.outputs) for step in one.steps] for one in (twin, plan)]
    assert places[0] == places[1] and twin.workspace == plan.workspace, "the twin places things elsewhere"
    # A GPU's layers take their weights in tiles of their own.
    assert here.instructions.is_gpu or np.array_equal(twin.weights, plan.weights), "the twin has other weights"
    return twin, build(twin, here, for_tvm=False)


class _Run:
    """A plan run here, in a workspace of zeros, through the C function of its code."""

    def __init__(self, plan: Plan, code: Code, inputs: Sequence[np.ndarray]) -> None:
        self._plan, self._entry = plan, _entry(code)
        given = zip(inputs, plan.inputs, strict=True)
        self.inputs = [np.array(array, dtype, order="C").reshape(shape) for array, (shape, dtype) in given]
        self.outputs = [np.zeros(shape, dtype) for shape, dtype in plan.outputs]
        memory = {WEIGHTS: plan.weights, WORKSPACE: _zeros(plan.workspace), SCRATCH: _zeros(code.scratch)}
        self._buffers = [*(memory[number] for number in sorted(memory)), *self.inputs, *self.outputs]
        self._pointers = (ctypes.c_void_p * len(self._buffers))(*(buffer.ctypes.data for buffer in self._buffers))

    def step(self, number: int) -> int:
        """Run one step; the checksum of its results."""
        self._entry(self._pointers, number, number + 1, 0, 1)
        step = self._plan.steps[number]
        return checksum(*map(self._bytes, step.results, step.outputs))

    def _bytes(self, view: View, size: int) -> memoryview:
        return self._buffers[view.buffer].reshape(-1).view(np.uint8)[view.offset : view.offset + size].data


def _entry(code: Code) -> Any:
    """``pumice_steps`` of ``code``, linked by itself; the file is gone when it has been mapped."""
    with TemporaryDirectory(prefix="pumice-") as name:
        folder = Path(name)
        code.module.write_to_file(str(folder / "code.o"))
        find_toolchain(Target.parse("native")).link("code.so", ["code.o"], folder)
        entry = ctypes.CDLL(str(folder / "code.so")).pumice_steps
    entry.argtypes = [ctypes.c_void_p, *[ctypes.c_int32] * 4]
    return entry


def _zeros(size: int) -> np.ndarray:
    memory = aligned((size,), "uint8")
    memory.fill(0)
    return memory


def _is_inexact(kernel: tirx.PrimFunc, target: Target) -> bool:
    found, varies = [], _may_round_otherwise(target)
    tvm_ffi.structural_walk(
        kernel.body,
        [
            (Call, lambda call: found.append(_calls_inexact(call))),
            ((tirx.Add, tirx.Sub), lambda node: found.append(varies and _adds_float_product(node))),
        ],
    )
    return any(found)


def _adds_float_product(node: tirx.Add | tirx.Sub) -> bool:
    return str(node.a.ty).startswith("float") and any(isinstance(side, tirx.Mul) for side in (node.a, node.b))


def _calls_inexact(call: Call) -> bool:
    name = call.op.name.removeprefix("tirx.") if isinstance(call.op, Op) else ""
    if name in ("call_llvm_intrin", "call_llvm_pure_intrin"):
        name = llvm_get_intrinsic_name(int(call.args[0])).removeprefix("llvm.").split(".")[0]
    # What Pumice's own kernels call by name gives integers, but where a GPU's threads exchange floats.
    return name in _LIBM or (name in ("call_extern", "call_pure_extern") and str(call.ty).startswith("float"))
