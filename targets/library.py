"""From a plan to one shared library with its weights and manifest inside, written whole or not at all.

The weights are a section of their own, read-only and on pages of their own: the loader maps it, and nothing of it is
copied or even read before a kernel does.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pumice.files import move_into_place
from pumice.targets.build import Code, build
from pumice.targets.build_cuda import CudaCode, build_cuda
from pumice.targets.check import Check
from pumice.targets.manifest import SECTION, encode_manifest
from pumice.targets.model_source import ModelTables
from pumice.targets.plan import Plan
from pumice.targets.target import Target
from pumice.targets.toolchain import Toolchain, find_toolchain

WEIGHTS_SYMBOL = "pumice_weights"

RUNTIME = Path(__file__).with_name("runtime")

_SHARED = ("core.c", "pumice.h", "model.h", "exports.map")
_CPU = ("cpu.c", "cpu_features.c", "cpu_features.h")
_GPU = ("cuda.c", "cuda_driver.h")

_OPTIONS = (
    "-std=c11",
    "-fvisibility=hidden",
    "-fno-ident",
    "-Wl,-Bsymbolic",  # another model in the process has the same names
    "-Wl,-z,relro,-z,now,-z,noexecstack",
    "-nostartfiles",  # there is nothing to do when it is loaded, and those files ask for symbols of the compiler's
    "-Wl,-z,defs",
    "-Wl,--version-script=exports.map",
)

_DATA = f"""
.section {SECTION},"a",%progbits
.globl pumice_manifest_text
.hidden pumice_manifest_text
pumice_manifest_text:
.incbin "manifest.json"
.byte 0

.section .pumice.check,"a",%progbits
.balign 64
.globl pumice_check
.hidden pumice_check
pumice_check:
.incbin "check.bin"
.byte 0

.section .pumice.weights,"a",%progbits
.balign 4096
.globl {WEIGHTS_SYMBOL}
.type {WEIGHTS_SYMBOL}, %object
{WEIGHTS_SYMBOL}:
.incbin "weights.bin"
.byte 0
.size {WEIGHTS_SYMBOL}, . - {WEIGHTS_SYMBOL}

.section .note.GNU-stack,"",%progbits
"""


def write_library(
    plan: Plan,
    target: Target,
    manifest: dict[str, Any],
    path: str | Path,
    libc: str | None = None,
    check: Check | None = None,
    code: Code | CudaCode | None = None,
) -> None:
    """Build ``plan`` for ``target`` and link it, with ``manifest``, into the shared library ``path``.

    ``manifest`` names the plan's inputs and outputs; it gets the plan's ``steps``, the bytes of ``workspace``,
    ``scratch`` and ``weights``, the hash of the weights, and what of ``check`` is no array. ``libc`` is the C library
    of the box, as ``find_toolchain`` takes it; ``code`` is what ``build`` made of the plan, if it was built before.
    The library is linked elsewhere and moved into place when it is complete: on any failure what was at ``path`` stays.
    The same arguments give the same bytes. Raises UsageError where ``path`` cannot be written and
    MissingDependencyError without a C compiler.
    """
    path = Path(path)
    toolchain = find_toolchain(target, libc)
    code = code or build_code(plan, target)
    inputs, outputs = ([str(entry["name"]) for entry in manifest[kind]] for kind in ("inputs", "outputs"))
    tables = ModelTables(plan, target, inputs, outputs, code.scratch, check)
    planned = {
        "steps": [step.to_json() for step in plan.steps],
        "workspace": plan.workspace,
        "scratch": code.scratch,
        "weights": plan.weights.nbytes,
        "weights_sha256": hashlib.sha256(plan.weights.data).hexdigest(),
        "check": {"exact": check.exact, "tolerance": check.tolerance} if check else None,
    }
    with tempfile.TemporaryDirectory(prefix="pumice-") as temporary:
        folder = Path(temporary)
        Path(folder, "manifest.json").write_bytes(encode_manifest(manifest | planned))
        link(toolchain, tables, code.write(folder), folder)
        move_into_place(folder / "linked.so", path)


def build_code(plan: Plan, target: Target) -> Code | CudaCode:
    """Compile ``plan`` for the kind of device that ``target`` is. Raises as ``build_cuda`` does."""
    return build_cuda(plan, target) if target.runs_on_gpu else build(plan, target, for_tvm=False)


def link(toolchain: Toolchain, tables: ModelTables, code: Sequence[str], folder: Path) -> None:
    """Link ``code`` with the runtime and ``manifest.json`` into ``linked.so``; all are in ``folder``.

    ``code`` is objects and sources. Raises MissingDependencyError where the compiler fails, as it does when they need a
    symbol that neither libc nor libm has.
    """
    tables.plan.weights.tofile(folder / "weights.bin")
    Path(folder, "check.bin").write_bytes(tables.check_bytes())
    Path(folder, "model.c").write_text(tables.source())
    Path(folder, "data.s").write_text(_DATA)
    runtime = (*_SHARED, *(_GPU if tables.target.runs_on_gpu else _CPU))
    for name in runtime:
        shutil.copyfile(RUNTIME / name, folder / name)
    sources = [name for name in (*code, *runtime, "model.c", "data.s") if not name.endswith((".h", ".map"))]
    libraries = ["-ldl"] if tables.target.runs_on_gpu else []  # for the driver, at run time; glibc 2.34 has it inside
    toolchain.link("linked.so", [*sources, *libraries], folder, _OPTIONS)
