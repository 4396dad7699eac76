"""From a plan to code for GPUs: its kernels on blocks and threads, CUDA C++, an image for each architecture.

    step 3: layer_conv1(workspace + 0, weights + 512, ..)   ->   launches[3] = (layer_conv1_kernel, grid, block, ..)

A kernel that is bound to threads already stays as it is. One that TVM made gets TVM's own schedule for GPUs, any other
was written for a CPU and is spread. What a step's kernels hand on between them lies in the scratch buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import IRModule
from tvm.s_tir import dlight
from tvm.tirx import stmt as nodes

from pumice.targets.cuda_source import CudaSource, Launch, cuda_source
from pumice.targets.model_source import c_array
from pumice.targets.nvcc import find_nvcc
from pumice.targets.plan import Plan, align
from pumice.targets.spread import spread
from pumice.targets.target import Target


@dataclass(frozen=True)
class CudaCode:
    """What was compiled: ``cubins`` by architecture, and ``launches`` of kernels in these for each kernel of the plan.

    scratch: bytes of the device's memory that a step's kernels need while it runs
    """

    plan: Plan
    launches: Mapping[str, tuple[Launch, ...]]
    cubins: Mapping[str, bytes]
    scratch: int = 0

    def write(self, folder: Path) -> list[str]:
        """Write what is linked into a library into ``folder``; the files' names."""
        Path(folder, "cubins.bin").write_bytes(b"".join(map(_padded, self.cubins.values())))
        Path(folder, "cubins.s").write_text(_SECTION)
        Path(folder, "cuda_model.c").write_text(self._tables())
        return ["cuda_model.c", "cubins.s"]

    def _tables(self) -> str:
        """The C source of the tables that ``runtime/cuda_driver.h`` declares."""
        code, offset = [], 0
        for architecture, image in self.cubins.items():
            code.append(f"{{{int(architecture.removeprefix('sm_'))}, {offset}, {len(image)}}}")
            offset += len(_padded(image))
        launches, arguments, most = [], [], 0
        for number, step in enumerate(self.plan.steps):
            for launch in self.launches[step.kernel]:
                views = [step.arguments[i] for i in launch.arguments]
                most = max(most, len(views))
                sizes = ", ".join(f"{{{', '.join(map(str, size))}}}" for size in (launch.grid, launch.block))
                end = len(arguments) + len(views)
                launches.append(
                    f'{{"{launch.kernel}", {number}, {sizes}, {launch.shared_bytes}, {len(arguments)}, {end}}}'
                )
                arguments += [f"{{{view.buffer}, {view.offset}}}" for view in views]
        return f"""#include "cuda_driver.h"

{c_array("const cuda_code", "code", code)}
{c_array("const cuda_launch", "launches", launches)}
{c_array("const cuda_argument", "arguments", arguments)}
const cuda_tables pumice_cuda = {{
    .weights = {self.plan.weights.nbytes},
    .code_count = {len(code)},
    .launch_count = {len(launches)},
    .most_arguments = {most},
    .code = code,
    .launches = launches,
    .arguments = arguments,
}};
"""


def build_cuda(plan: Plan, target: Target) -> CudaCode:
    """Compile ``plan`` for every architecture of ``target``.

    Raises UnsupportedError for a kernel that cannot run on a GPU, and MissingDependencyError without nvcc.
    """
    compiler = find_nvcc()
    source = device_source(plan, target)
    return CudaCode(plan, source.launches, compiler.cubins(source.text, target.gpus))


def device_source(plan: Plan, target: Target) -> CudaSource:
    """The CUDA C++ of all kernels of ``plan``, and for each of them its launches. Needs no tool of NVIDIA's.

    Raises UnsupportedError for a kernel that cannot run on a GPU.
    """
    return cuda_source({name: _on_threads(kernel, target) for name, kernel in plan.kernels.items()})


def _on_threads(kernel: tirx.PrimFunc, target: Target) -> tirx.PrimFunc:
    kinds = _statements(kernel)
    if "bound" in kinds:
        return kernel
    if "scheduled" not in kinds:
        return spread(kernel)
    with target.tvm:
        scheduled = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(IRModule({"main": kernel}))
    return scheduled["main"]


def _statements(kernel: tirx.PrimFunc) -> set[str]:
    """``bound`` if some loop runs over threads, ``scheduled`` if TVM's schedules can change it."""
    found: set[str] = set()

    def loop(stmt: nodes.For) -> None:
        found.update({"bound"} if stmt.kind == tirx.ForKind.THREAD_BINDING else ())

    def attribute(stmt: nodes.AttrStmt) -> None:
        found.update({"bound"} if stmt.attr_key == "thread_extent" else ())

    def block(stmt: s_tir.SBlock) -> None:
        found.add("scheduled")

    tvm_ffi.structural_walk(kernel.body, [(nodes.For, loop), (nodes.AttrStmt, attribute), (s_tir.SBlock, block)])
    return found


def _padded(image: bytes) -> bytes:
    """The driver reads an image as the ELF file that it is, whose tables are aligned."""
    return image + bytes(align(len(image)) - len(image))


_SECTION = """
.section .pumice.cubins,"a",%progbits
.balign 64
.globl pumice_cubins
.hidden pumice_cubins
pumice_cubins:
.incbin "cubins.bin"
.byte 0

.section .note.GNU-stack,"",%progbits
"""
