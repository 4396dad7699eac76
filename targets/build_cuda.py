"""From a plan to code for GPUs: its kernels as CUDA C++, compiled for each architecture, and the table of launches.

    step 3: layer_conv1(workspace + 0, weights + 512, ..)   ->   layer_conv1_kernel, grid, block, places of arguments

A library holds the table and an image for each architecture; ``runtime/cuda.c`` loads the one that fits the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pumice.targets.cuda_source import Launch, cuda_source
from pumice.targets.gpu_plan import gpu_plan
from pumice.targets.model_source import c_array
from pumice.targets.nvcc import find_nvcc
from pumice.targets.plan import Plan, align
from pumice.targets.target import Target


@dataclass(frozen=True)
class CudaCode:
    """What was compiled: ``cubins`` by architecture, and ``launches`` of kernels in these for each kernel of ``plan``.

    plan: with kernels for a GPU, as ``gpu_plan`` makes it
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
        launches: list[str] = []
        arguments: list[str] = []
        most = 0
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
    bound, scratch = gpu_plan(plan, target)
    source = cuda_source(bound.kernels)
    return CudaCode(bound, source.launches, compiler.cubins(source.text, target.gpus), scratch)


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
