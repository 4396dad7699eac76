"""NVIDIA's compiler: from CUDA C++ to code for GPUs, one image for each architecture."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pumice.errors import MissingDependencyError, UnsupportedError

USUAL = "/usr/local/cuda/bin/nvcc"  # where NVIDIA's own package puts it

# Products and sums are fused where the kernels say so and nowhere else; quotients and roots are IEEE's, as on a CPU.
OPTIONS = ("-std=c++17", "-O3", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false")

_INSTALL = (
    "install the CUDA toolkit (Debian: `apt-get install nvidia-cuda-toolkit`, or NVIDIA's own package) and put nvcc on "
    "PATH, or set CUDA_HOME; no GPU and no driver are needed"
)


@dataclass(frozen=True)
class Nvcc:
    """A compiler that was found: the path of its program."""

    command: str

    def architectures(self) -> frozenset[str]:
        """What it compiles for, as ``sm_87``."""
        listed = self._run(["--list-gpu-code"], Path.cwd()).stdout
        return frozenset(re.findall(r"\bsm_\d+\b", listed))

    def cubins(self, source: str, architectures: Sequence[str]) -> dict[str, bytes]:
        """``source`` compiled for each of ``architectures``; the same source gives the same bytes.

        Raises UnsupportedError for an architecture that this version of the compiler does not know and
        MissingDependencyError where it fails.
        """
        unknown = sorted(set(architectures) - self.architectures())
        if unknown:
            raise UnsupportedError(
                f"'{self.command}' does not compile for {', '.join(unknown)}: install another version of the CUDA "
                "toolkit, or give another target"
            )
        with tempfile.TemporaryDirectory(prefix="pumice-") as name:
            folder = Path(name)
            Path(folder, "kernels.cu").write_text(source)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return dict(zip(architectures, pool.map(lambda a: self._cubin(a, folder), architectures), strict=True))

    def _cubin(self, architecture: str, folder: Path) -> bytes:
        output = f"{architecture}.cubin"
        done = self._run(["-cubin", f"-arch={architecture}", *OPTIONS, "kernels.cu", "-o", output], folder)
        if done.returncode != 0 or not Path(folder, output).is_file():
            lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            why = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
            raise MissingDependencyError(f"'{self.command}' could not compile the kernels for {architecture}: {why}")
        return Path(folder, output).read_bytes()

    def _run(self, arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
        command = [self.command, *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)


def find_nvcc() -> Nvcc:
    """The compiler of $CUDA_HOME, on PATH, at its usual place, or of the wheel ``nvidia-cuda-nvcc``.

    Raises MissingDependencyError where there is none.
    """
    home = os.environ.get("CUDA_HOME", "")
    candidates = [f"{home}/bin/nvcc" if home else "", "nvcc", USUAL, *_in_wheels()]
    for candidate in filter(None, candidates):
        found = shutil.which(candidate)
        if found:
            return Nvcc(found)
    raise MissingDependencyError(f"compiling for a GPU needs NVIDIA's nvcc and none was found: {_INSTALL}")


def _in_wheels() -> list[str]:
    """Where pip puts it."""
    package = importlib.util.find_spec("nvidia")
    folders = list(package.submodule_search_locations or []) if package else []
    return [str(path) for folder in folders for path in sorted(Path(folder).glob("*/bin/nvcc"))]
