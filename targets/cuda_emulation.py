"""Generated CUDA source on this CPU: its numbers without a GPU, and what a GPU would not forgive.

The source is compiled by g++ against ``runtime/emulation/cuda.h``, without fusing products and sums. Every array lies
beside a page that nothing may touch, so that an access beyond that end is found as it happens: run a kernel both ways.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from pumice.errors import MissingDependencyError, PumiceError
from pumice.targets.cuda_source import CudaSource, Launch

_FLAGS = "-std=c++17 -O1 -w -fPIC -shared -ffp-contract=off -fno-strict-aliasing -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=0"
_WHAT_WENT_WRONG = {
    1: "it touched memory outside of its arguments, or not aligned",
    2: "not all threads of a block came to the same barrier",
}


class EmulationError(PumiceError):
    """A kernel did what a GPU would not survive, or not notice."""


class Emulation:
    """The kernels of a source, compiled for this CPU.

    Raises MissingDependencyError where there is no g++.
    """

    def __init__(self, source: CudaSource) -> None:
        self.source = source
        self._library = _compile(source)

    def run(self, name: str, *arrays: np.ndarray, is_reversed: bool = False) -> None:
        """Launch the kernels of function ``name`` on ``arrays``, which they change in place.

        ``is_reversed`` runs blocks and threads in the opposite order, and guards the starts of the arrays instead of
        their ends. Raises EmulationError where a kernel touches what is not its own, or hangs.
        """
        with guarded(arrays, is_reversed) as pointers:
            for launch in self.source.launches[name]:
                self.launch(launch, [pointers[i] for i in launch.arguments], is_reversed)

    def launcher(self, launch: Launch) -> Any:
        """The C function of a kernel: ``int (void **pointers, unsigned *grid, unsigned *block, int is_reversed)``."""
        return self._library[f"{launch.kernel}_launch"]

    def launch(self, launch: Launch, pointers: Sequence[int], is_reversed: bool = False) -> None:
        """One kernel on addresses of this process."""
        three = ctypes.c_uint * 3
        status = self.launcher(launch)(
            (ctypes.c_void_p * len(pointers))(*pointers), three(*launch.grid), three(*launch.block), int(is_reversed)
        )
        if status:
            raise EmulationError(f"CUDA kernel '{launch.kernel}', emulated: {_WHAT_WENT_WRONG[status]}")


@contextmanager
def guarded(arrays: Sequence[np.ndarray], at_start: bool = False) -> Iterator[list[int]]:
    """Addresses of copies of ``arrays``, each before (or behind) a page without access; copied back at the end."""
    regions = [_Region(array.nbytes, at_start) for array in arrays]
    for region, array in zip(regions, arrays, strict=True):
        ctypes.memmove(region.address, np.ascontiguousarray(array).ctypes.data, array.nbytes)
    yield [region.address for region in regions]
    for region, array in zip(regions, arrays, strict=True):
        array[...] = np.frombuffer(ctypes.string_at(region.address, array.nbytes), array.dtype).reshape(array.shape)


class _Region:
    """``size`` bytes between two pages without access: next to the first, or (to 16 bytes) to the second."""

    def __init__(self, size: int, at_start: bool) -> None:
        page = mmap.PAGESIZE
        inside = -(-max(size, 1) // page) * page
        self._memory = mmap.mmap(-1, inside + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        libc = ctypes.CDLL(None)
        for guard in (start, start + page + inside):
            libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0)
        slack = 0 if at_start else inside - -(-size // _ALIGNMENT) * _ALIGNMENT
        self.address = start + page + slack


_ALIGNMENT = 16  # of the widest load


def _compile(source: CudaSource) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        raise MissingDependencyError("emulating CUDA kernels needs g++: install it (Debian: apt install g++)")
    kernels = [launch.kernel for launches in source.launches.values() for launch in launches]
    lines = [f"PUMICE_LAUNCH({name}, {str(_waits(source.text, name)).lower()})" for name in dict.fromkeys(kernels)]
    headers = resources.files("pumice.targets") / "runtime" / "emulation"
    with tempfile.TemporaryDirectory(prefix="pumice-") as folder, resources.as_file(headers) as include:
        code, library = Path(folder, "kernels.cc"), Path(folder, "kernels.so")
        code.write_text("\n".join([source.text, *lines, ""]))
        subprocess.run([compiler, *_FLAGS.split(), f"-I{include}", str(code), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def _waits(text: str, kernel: str) -> bool:
    """Whether the threads of a kernel wait for each other anywhere."""
    body = re.search(rf"\b{kernel}\([^)]*\) \{{\n(.*?)\n\}}\n", text, re.DOTALL)
    return body is None or re.search(r"__sync|__shfl|pumice_mma", body[1]) is not None
