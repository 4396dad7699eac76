"""A GPU on this CPU: NVIDIA's driver faked in C, with emulated kernels where a library has its cubins."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from tvm.ir import IRModule

from pumice.passes.link_steps import link_steps
from pumice.passes.pipeline import LowerOptions, lower
from pumice.targets.build_cuda import CudaCode
from pumice.targets.cuda_emulation import Emulation
from pumice.targets.cuda_source import CudaSource, cuda_source
from pumice.targets.gpu_plan import gpu_plan
from pumice.targets.library import write_library
from pumice.targets.plan import Plan
from pumice.targets.target import Target
from pumice.verify import make_check

needs_gxx = pytest.mark.skipif(not shutil.which("g++"), reason="emulation needs g++: apt-get install g++")

BESIDE_THIS = Target.parse("sm_87@x86-64")
_DRIVER = Path(__file__).with_name("targets") / "fake_cuda" / "driver.c"


def fake_cubin(source: CudaSource, emulation: Emulation) -> bytes:
    """What the fake driver takes for code."""
    lines = ["FAKE"]
    for launches in source.launches.values():
        for launch in launches:
            address = ctypes.cast(emulation.launcher(launch), ctypes.c_void_p).value
            lines.append(f"{launch.kernel} {len(launch.arguments)} {address}")
    return "\n".join([*lines, "", ""]).encode()


@dataclass(frozen=True)
class Emulated:
    """A library whose kernels are emulated; these live as long as ``emulation``."""

    path: Path
    plan: Plan
    code: CudaCode
    emulation: Emulation


def emulated_library(
    mod: IRModule, path: Path, samples: dict[str, np.ndarray] | None = None, target: Target = BESIDE_THIS
) -> Emulated:
    """``mod`` compiled for a GPU, with emulated kernels for each of the target's cubins."""
    options = LowerOptions()
    plan = link_steps(lower(mod, target, options))
    bound, scratch = gpu_plan(plan, target)
    source = cuda_source(bound.kernels)
    emulation = Emulation(source)
    code = CudaCode(bound, source.launches, dict.fromkeys(target.gpus, fake_cubin(source, emulation)), scratch)
    check = make_check(mod, target, options, plan, code, samples)
    write_library(plan, target, manifest_of(plan, target), path, check=check, code=code)
    return Emulated(path, plan, code, emulation)


def manifest_of(plan: Plan, target: Target) -> dict[str, Any]:
    def tensors(prefix: str, specs: Any) -> list[dict[str, Any]]:
        return [{"name": f"{prefix}{i}", "shape": list(s), "dtype": d} for i, (s, d) in enumerate(specs)]

    described = {"name": target.name, "architecture": target.architecture, "features": [], "isa": target.isa}
    signature = {"inputs": tensors("x", plan.inputs), "outputs": tensors("y", plan.outputs)}
    return {**signature, "target": described, "layers": [], "versions": {}, "options": {}, "source": {}}


class FakeDriver:
    """The driver that libraries of this process find under ``name``; its variables are attributes.

    Whoever asks for a name gets what was first loaded under it, so there is one for each name.
    """

    _loaded: ClassVar[dict[str, ctypes.CDLL]] = {}

    def __init__(self, folder: Path, *options: str, name: str = "libcuda.so.1") -> None:
        if name not in self._loaded:
            command = ["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", *options]
            subprocess.run([*command, f"-Wl,-soname,{name}", str(_DRIVER), "-o", str(folder / name)], check=True)
            self._loaded[name] = ctypes.CDLL(str(folder / name))
        self._library = self._loaded[name]

    def __getattr__(self, name: str) -> int:
        return ctypes.c_int.in_dll(self._library, f"fake_{name}").value

    @contextmanager
    def set(self, **values: int) -> Iterator[None]:
        variables = [ctypes.c_int.in_dll(self._library, f"fake_{name}") for name in values]
        before = [variable.value for variable in variables]
        for variable, value in zip(variables, values.values(), strict=True):
            variable.value = value
        yield
        for variable, value in zip(variables, before, strict=True):
            variable.value = value

    @contextmanager
    def failing(self, function: str, error: int = 719) -> Iterator[None]:
        name = (ctypes.c_char * 64).in_dll(self._library, "fake_failing")
        with self.set(error=error):
            name.value = function.encode()
            yield
            name.value = b""
