"""Runs what Pumice compiled. This one file and NumPy are all that a box with Python needs: copy it there.

    python loader.py model.so describe               what it takes and gives; nothing of it is executed
    python loader.py model.so verify                 its numbers on this machine against those it was compiled with
    python loader.py model.so run in.npz out.npz     one inference

    model = loader.load("model.so", threads=2)       # or a bundle of variants: model.pum
    outputs = model(image=array)                     # dict of arrays out

Python 3.8 or later. A library is read before anything of it is mapped: one that is damaged, of another architecture or
for another CPU is refused with a sentence. ``pumice.load`` stands on this file too.
"""

# ruff: noqa: B905 (Python 3.8 has no zip(strict=True))
from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import platform
import struct
import sys
import tempfile
import threading
import weakref
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

SECTION = ".pumice.manifest"
FORMAT = 3  # of the manifest; a reader refuses another
ABI, MAX_THREADS = 1, 1024  # of the C interface, pumice.h
INDEX, BUNDLE_FORMAT = "bundle.json", 1

_MAX_BYTES = 64 << 20  # no manifest comes near: a corrupt header must not make the reader allocate gigabytes
_SUSPICIOUS_BYTES, _SUSPICIOUS_RATIO = 256 << 20, 200  # a library larger than both, for its archive, is not unpacked


class PumiceError(Exception):
    """Base of all that is raised on purpose, and what memory, threads or a device fail with; the command's exit code.

    The package's ``pumice.errors`` is the same hierarchy and has more of it.
    """

    exit_code = 1


class UsageError(PumiceError):
    """The call itself is wrong: an option, an input's name, a missing shape."""

    exit_code = 2


class ModelError(PumiceError):
    """The file cannot be used as it is: not a model or a library, cut off, damaged."""

    exit_code = 3


class UnsupportedError(PumiceError):
    """A legal file for another machine; for the compiler, an operator, data type or target that it does not know."""

    exit_code = 4


class MissingDependencyError(PumiceError):
    """A tool, package or device is needed that is not there; the message names it and how to get it."""

    exit_code = 5


class DifferenceError(PumiceError):
    """The library computes other numbers here than it did when it was compiled."""

    exit_code = 6


class TensorSpec(NamedTuple):
    """One input or output: its name in the source model, its shape and its NumPy dtype; its scale where quantized."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float | None = None
    zero_point: int | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} {'x'.join(map(str, self.shape)) or 'scalar'}"

    @property
    def rounding(self) -> str:
        """What it is rounded to bytes by; empty where it is not."""
        return "" if self.scale is None else f" (in int8: scale {self.scale:.4g}, zero point {self.zero_point})"


def load(path: str | Path, threads: int | None = None) -> Model:
    """A library (.so) or the best variant of a bundle (.pum), ready to run on ``threads`` threads.

    Of a bundle, the first variant is taken, in the bundle's own order, that this machine can run. ``threads`` None is
    what the library was compiled for, or one. Raises, before any code is mapped, UnsupportedError for a library of
    another architecture or one whose instructions this CPU lacks and ModelError for a file that is none; afterwards
    MissingDependencyError without the device that it needs and PumiceError where memory or threads run out.
    """
    path = Path(path)
    if not is_bundle(path):
        return Model(Library(path), threads)
    bundle, refusals = Bundle(path), []
    for variant in bundle.variants:
        try:
            check_runs_here(variant.name, variant.target)
            return Model(bundle.open(variant), threads)
        except (UnsupportedError, MissingDependencyError) as error:
            refusals.append(str(error))
    raise UnsupportedError(f"{path}: none of its variants runs on this machine: {'; '.join(refusals)}")


class Library:
    """A library mapped into this process, whose weights all its models share. ``name`` stands for it in messages."""

    def __init__(self, path: str | Path, name: str = "") -> None:
        path = Path(path)
        self.name = name or str(path)
        self.manifest = read_manifest(path)
        self.inputs, self.outputs = signature(self.manifest)
        check_runs_here(self.name, self.manifest["target"])
        try:
            self.c = _declare(ctypes.CDLL(str(path.resolve())))  # dlopen searches elsewhere for a name without a slash
            version = self.c.pumice_abi()
        except (OSError, AttributeError) as error:
            raise ModelError(f"{self.name}: cannot be loaded ({error}); copy or compile it again") from error
        if version != ABI:
            raise ModelError(
                f"{self.name}: has version {version} of the C interface, and this is version {ABI}; take the loader "
                "that came with it, or compile it again"
            )
        self._check_sizes()

    def _check_sizes(self) -> None:
        """What the manifest says of arrays, which are allocated by it, must be what the code reads and writes."""
        for kind, specs in (("input", self.inputs), ("output", self.outputs)):
            told = [_bytes(spec) for spec in specs]
            count = getattr(self.c, f"pumice_{kind}_count")()
            if told != [getattr(self.c, f"pumice_{kind}")(index).contents.bytes for index in range(count)]:
                raise ModelError(f"{self.name}: its manifest is not that of its code; copy or compile it again")


class Model:
    """One instance of a library: memory and threads of its own. ``model(image=array)`` runs it.

    It serves one caller at a time, so calls from several threads take turns; give each thread a ``Model`` of the same
    ``Library`` to run side by side. Close it (or leave its ``with``) to give memory and threads back at once.
    """

    def __init__(self, library: Library, threads: int | None = None) -> None:
        self.library, self.manifest = library, library.manifest
        self.inputs, self.outputs = library.inputs, library.outputs
        self.threads = check_threads(threads if threads is not None else self.manifest.get("threads") or 1)
        self._binding, self._steps = Binding(library.name, self.inputs), library.c.pumice_step_count()
        self._lock = threading.Lock()
        self._pointers = [(ctypes.c_void_p * max(1, len(specs)))() for specs in (self.inputs, self.outputs)]
        instance, message = ctypes.c_void_p(), ctypes.create_string_buffer(1024)
        status = library.c.pumice_open(self.threads, ctypes.byref(instance), message, len(message))
        if status:
            raise _error(status, library.name, message.value)
        self._instance = instance
        self._finalizer = weakref.finalize(self, library.c.pumice_close, instance)

    def close(self) -> None:
        """End its threads and free its memory, when what runs now has ended; it may not be used after."""
        with self._lock:
            self._finalizer()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __call__(self, *arrays: Any, **named: Any) -> dict[str, np.ndarray]:
        """Run one inference; the outputs by name, in arrays of their own.

        Inputs go by name (``model(image=a)``, or one dict for names that are no identifiers) or by position. An
        array must have the input's shape; float64 is rounded to the float32 that a model wants, and a narrower type
        of the same kind is widened, but nothing is cast between integers and floats: bytes 0..255 given for an
        image in 0..1 would be silently wrong. NaN and infinity pass through. Raises UsageError for what does not fit.
        """
        results = [np.empty(spec.shape, spec.dtype) for spec in self.outputs]
        self._run(self.bind(arrays, named), results, 0, self._steps)
        return {spec.name: array for spec, array in zip(self.outputs, results)}

    def run(
        self, inputs: Sequence[Any], outputs: Sequence[np.ndarray], first: int = 0, last: int | None = None
    ) -> None:
        """The same into arrays of the caller's, in the model's order: no array is made or copied.

        ``inputs`` that are contiguous and of the right type are read where they lie. With ``first`` and ``last``,
        only the steps from ``first`` up to but without ``last`` run. Raises UsageError for arrays that do not fit.
        """
        if len(outputs) != len(self.outputs):
            raise UsageError(f"{self.library.name} gives {len(self.outputs)} outputs, not {len(outputs)}")
        for array, spec in zip(outputs, self.outputs):
            _check_result(array, spec)
        self._run(self.bind(inputs, {}), outputs, first, self._steps if last is None else last)

    def bind(self, arrays: Sequence[Any], named: Mapping[str, Any]) -> list[np.ndarray]:
        """Arguments as a call takes them -> what ``run`` takes: one array for each input, of its shape and type."""
        return [_laid_out(*each) for each in zip(self._binding(arrays, named), self.inputs)]

    def verify(self) -> None:
        """Run the stored input and hold every layer against its stored checksum.

        Raises DifferenceError, naming the first layer that differs; UsageError for a library without a check.
        """
        if not self.manifest.get("check"):
            raise UsageError(f"{self.library.name}: was compiled without a check (--no-check), so none can be made")
        step = ctypes.c_uint32()
        with self._lock:
            self._done(self.library.c.pumice_verify(self._open(), ctypes.byref(step)))

    def _run(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray], first: int, last: int) -> None:
        with self._lock:
            for pointers, given in zip(self._pointers, (inputs, outputs)):
                for index, array in enumerate(given):
                    pointers[index] = array.__array_interface__["data"][0]
            self._done(self.library.c.pumice_run_steps(self._open(), *self._pointers, first, last))

    def _open(self) -> ctypes.c_void_p:
        if not self._finalizer.alive:
            raise UsageError(f"{self.library.name}: this model is closed")
        return self._instance

    def _done(self, status: int) -> None:
        if status:
            raise _error(status, self.library.name, self.library.c.pumice_error(self._instance))


class Binding:
    """Arguments of a call -> one array for each input, in order, or a UsageError that says what is wrong with them."""

    def __init__(self, name: str, inputs: Sequence[TensorSpec]) -> None:
        self._file, self._inputs = Path(name).name, inputs
        self._types = {spec.name: np.dtype(spec.dtype) for spec in inputs}

    def __call__(self, arrays: Sequence[Any], named: Mapping[str, Any]) -> list[np.ndarray]:
        """The arrays, not copied where they fit as they are."""
        if len(arrays) == 1 and isinstance(arrays[0], Mapping):
            named, arrays = {**arrays[0], **named}, ()
        if len(arrays) == len(self._inputs) and not named:
            given: Sequence[Any] = arrays
        elif not arrays and named.keys() == self._types.keys():
            given = [named[name] for name in self._types]
        else:
            given = self._mixed(arrays, named)
        return [_fit(*each) for each in zip(given, self._inputs, self._types.values())]

    def _mixed(self, arrays: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
        """Some by position and the others by name."""
        names = list(self._types)
        if len(arrays) > len(names):
            raise UsageError(f"{self._file} takes {len(names)} inputs ({', '.join(names)}), not {len(arrays)}")
        given = dict(zip(names, arrays))
        for problem, which in (
            ("given twice", [name for name in given if name in named]),
            ("missing", [name for name in names if name not in given and name not in named]),
            ("not known", [name for name in named if name not in names]),
        ):
            if which:
                listed = "; ".join(str(spec) for spec in self._inputs) or "no inputs"
                raise UsageError(f"{self._file}: input '{which[0]}' is {problem}; the model takes {listed}")
        return [{**given, **named}[name] for name in names]


def _fit(value: Any, spec: TensorSpec, wanted: np.dtype[Any]) -> np.ndarray:
    if type(value) is np.ndarray and value.dtype == wanted and value.shape == spec.shape:
        return value
    array = np.asarray(value)
    if array.dtype != wanted:
        same_kind = array.dtype.kind == wanted.kind
        narrowing = array.dtype == np.float64 and wanted == np.float32
        if not (same_kind and (narrowing or np.can_cast(array.dtype, wanted, "safe"))):
            raise UsageError(
                f"input '{spec.name}' is {array.dtype} and the model takes {wanted}: convert it, with the scaling "
                f"that the model was trained with (array.astype('{wanted}') if there is none)"
            )
    if array.shape != spec.shape:
        raise UsageError(f"input '{spec.name}' has shape {array.shape} and the model takes {spec.shape}")
    return array


def _laid_out(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    if array.flags.c_contiguous and array.flags.aligned and array.dtype == spec.dtype:
        return array
    return np.array(array, spec.dtype, order="C")


def _check_result(array: np.ndarray, spec: TensorSpec) -> None:
    if array.shape != spec.shape or array.dtype != spec.dtype:
        raise UsageError(f"output '{spec.name}' goes into {array.dtype} {array.shape} and is {spec.dtype} {spec.shape}")
    if not (array.flags.c_contiguous and array.flags.writeable and array.flags.aligned):
        raise UsageError(f"output '{spec.name}': the array for it must be contiguous, aligned and writeable")


# The file, read without executing anything of it

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")  # Elf64_Ehdr
_SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")  # Elf64_Shdr
_MACHINES = {62: "x86_64", 183: "aarch64"}
_REQUIRED = ("target", "inputs", "outputs", "layers", "steps", "workspace", "weights", "versions")


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a library, for whatever machine it is.

    Raises ModelError when the file is not such a library, is cut off, has lost its section, or was written by
    another version of Pumice with another form of manifest.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = _read_section(file, path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        manifest = json.loads(data.rstrip(b"\0"))  # C reads it as a string
        form = manifest["format"]
        if form == FORMAT:
            complete = None not in [manifest[key] for key in _REQUIRED]
            signature(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: its section {SECTION} is damaged; compile the model again") from error
    if form != FORMAT or not complete:
        raise ModelError(
            f"{path}: its manifest has format {form}, and this version of Pumice reads format {FORMAT}; "
            "compile the model again, or install the version that wrote it"
        )
    return dict(manifest)


def signature(manifest: Mapping[str, Any]) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The inputs and outputs of a manifest."""
    inputs, outputs = [[_spec(entry) for entry in manifest[kind]] for kind in ("inputs", "outputs")]
    return inputs, outputs


def check_runs_here(name: str, target: Mapping[str, Any]) -> None:
    """Raise UnsupportedError where this machine cannot run code for ``target`` of a manifest.

    Where the system does not list the CPU's features, the library's own check at ``pumice_open`` decides.
    """
    if target["architecture"] != host_architecture():
        raise UnsupportedError(
            f"{name}: was compiled for {target['architecture']} (target {target['name']}) and this machine is "
            f"{host_architecture()}; run it there, or compile it with --target native"
        )
    features = host_features()
    missing = sorted(set(target["features"]) - features) if features else []
    if missing:
        raise UnsupportedError(
            f"{name}: was compiled for target {target['name']} and this CPU lacks {', '.join(missing)}; run it on "
            "such a machine, or compile it with --target native"
        )


def host_architecture() -> str:
    """``x86_64`` or ``aarch64``; another machine's own word for itself otherwise."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


@lru_cache(maxsize=None)  # noqa: UP033 (Python 3.8 has no functools.cache); the file takes a while with many cores
def host_features() -> frozenset[str]:
    """The instruction sets that every core of this machine has, in /proc/cpuinfo's words; none without that file."""
    path = Path("/proc/cpuinfo")
    return parse_cpuinfo(path.read_text(errors="replace")) if path.exists() else frozenset()


def parse_cpuinfo(text: str) -> frozenset[str]:
    """The flags that all processors of a /proc/cpuinfo have in common (cores of one ARM chip may differ)."""
    cores = [
        frozenset(value.split())
        for key, _, value in (line.partition(":") for line in text.splitlines())
        if key.strip() in ("flags", "Features")
    ]
    return frozenset.intersection(*cores) if cores else frozenset()


def check_threads(threads: Any) -> int:
    """``threads`` itself; UsageError where it is no whole number of at least one."""
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise UsageError(f"the thread count is {threads!r}: give a whole number")
    if not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"the thread count is {threads}: give 1 or more, at most one for each core")
    return threads


def _read_section(file: BinaryIO, path: Path) -> bytes:
    """The bytes of ``SECTION``; every offset is held against the file's length before it is followed."""
    size = file.seek(0, 2)

    def read(offset: int, length: int) -> bytes:
        if offset + length > size:
            raise ModelError(f"{path}: is cut off ({size} bytes, needs {offset + length}); copy or compile it again")
        file.seek(offset)
        return file.read(length)

    magic = read(0, min(size, 4))
    if magic != b"\x7fELF":
        what = "is empty" if size == 0 else "is not a shared library (no ELF header)"
        raise ModelError(f"{path}: {what}; give a file that `pumice compile` wrote")
    fields = _HEADER.unpack(read(0, _HEADER.size))
    ident, machine, table, entry_size, count, names_index = fields[0], fields[2], fields[6], *fields[11:14]
    if ident[4:6] != b"\x02\x01" or machine not in _MACHINES:
        raise ModelError(
            f"{path}: is a library for a machine that Pumice never compiles for (ELF machine {machine}), "
            f"not for {' or '.join(_MACHINES.values())}"
        )
    if not table or entry_size != _SECTION_HEADER.size or names_index >= count:
        raise ModelError(f"{path}: has no section table, so its manifest is lost (stripped?); compile it again")
    headers = list(_SECTION_HEADER.iter_unpack(read(table, entry_size * count)))
    names_offset, names_size = headers[names_index][4:6]
    if names_size > _MAX_BYTES:
        raise ModelError(f"{path}: its section table is damaged; copy or compile it again")
    names = read(names_offset, names_size)
    wanted = SECTION.encode() + b"\0"
    for name, _, _, _, offset, length, *_ in headers:
        if names[name : name + len(wanted)] == wanted:
            if length > _MAX_BYTES:
                raise ModelError(f"{path}: its section {SECTION} is damaged; compile the model again")
            return read(offset, length)
    raise ModelError(f"{path}: has no section {SECTION}: it was not written by `pumice compile`, or was stripped")


def _spec(entry: Mapping[str, Any]) -> TensorSpec:
    name, shape, dtype = str(entry["name"]), tuple(int(d) for d in entry["shape"]), np.dtype(str(entry["dtype"])).name
    if entry.get("scale") is None:
        return TensorSpec(name, shape, dtype)
    return TensorSpec(name, shape, dtype, float(entry["scale"]), int(entry["zero_point"]))


def _bytes(spec: TensorSpec) -> int:
    size = np.dtype(spec.dtype).itemsize
    for length in spec.shape:
        size *= length
    return size


# Bundles


class Variant(NamedTuple):
    """One library of a bundle: its file's name, the target of its manifest, and the pieces that it is made of."""

    name: str
    target: dict[str, Any]
    size: int
    sha256: str
    pieces: list[str]

    def to_json(self) -> dict[str, Any]:
        """As ``bundle.json`` has it, without the pieces."""
        return {"name": self.name, "target": self.target, "bytes": self.size, "sha256": self.sha256}


class Bundle:
    """An archive of libraries of one model for several machines (``pumice bundle``).

    A zip file, nothing in it compressed: ``bundle.json`` lists the variants, the best first, with the SHA-256 of each
    and the pieces that it is made of; every other member is a piece, named by its own SHA-256, so what libraries have
    in common is there once. No name in the archive is ever used as a path. Raises ModelError for a file that is none.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.size = self.path.stat().st_size
            with zipfile.ZipFile(self.path) as archive:
                self._sizes = self._members(archive)
                index = json.loads(archive.read(INDEX))
            if index["format"] != BUNDLE_FORMAT:
                raise ValueError(f"its format is {index['format']}, and this reads format {BUNDLE_FORMAT}")
            self.variants = [self._variant(entry) for entry in index["variants"]]
        except _BROKEN as error:
            raise self._damaged(error) from error

    def open(self, variant: Variant) -> Library:
        """Put ``variant`` together, hold it against its SHA-256, and map it; the file that it takes is gone after."""
        with tempfile.TemporaryDirectory(prefix="pumice-") as folder:
            path = Path(folder, "model.so")
            try:
                with path.open("xb") as file:
                    self.extract(variant, file)
            except OSError as error:
                raise UsageError(
                    f"{self.path}: cannot be unpacked in {tempfile.gettempdir()}: {error.strerror}; set TMPDIR"
                ) from error
            return Library(path, f"{self.path} ({variant.name})")

    def extract(self, variant: Variant, file: BinaryIO) -> None:
        """Write the library into ``file``. Raises ModelError where it is not what its SHA-256 says."""
        digest = hashlib.sha256()
        for piece in self._read(variant.pieces):
            digest.update(piece)
            file.write(piece)
        if digest.hexdigest() != variant.sha256:
            raise self._damaged(f"{variant.name} is not the file that went in")

    def _read(self, names: Sequence[str]) -> Iterator[bytes]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                for name in names:
                    yield archive.read(name)
        except _BROKEN as error:
            raise self._damaged(error) from error

    def _members(self, archive: zipfile.ZipFile) -> dict[str, int]:
        """The members' sizes, when the archive is as ``pumice bundle`` writes it."""
        sizes: dict[str, int] = {}
        for member in archive.infolist():
            name, size = member.filename, member.file_size
            if name != INDEX and not (len(name) == 64 and set(name) <= set("0123456789abcdef")):
                raise ValueError("a member has a name that no bundle has")
            if name in sizes:
                raise ValueError("a member is there twice")
            if member.compress_type != zipfile.ZIP_STORED or size != member.compress_size or size > self.size:
                raise ValueError("a member is compressed, or larger than the file")
            sizes[name] = size
        if sizes.get(INDEX, 0) > _MAX_BYTES:
            raise ValueError(f"{INDEX} is too large")
        return sizes

    def _variant(self, entry: Mapping[str, Any]) -> Variant:
        target: dict[str, Any] = {key: str(entry["target"][key]) for key in ("name", "architecture", "isa")}
        target["features"] = [str(feature) for feature in entry["target"]["features"]]
        variant = Variant(str(entry["name"]), target, int(entry["bytes"]), str(entry["sha256"]), list(entry["pieces"]))
        if sum(self._sizes[piece] for piece in variant.pieces) != variant.size:
            raise ValueError(f"the pieces of {variant.name} are not as long as it is")
        if variant.size > max(_SUSPICIOUS_BYTES, _SUSPICIOUS_RATIO * self.size):
            raise ValueError(f"{self.size} bytes would unpack to {variant.size}")
        return variant

    def _damaged(self, why: object) -> ModelError:
        if isinstance(why, OSError):
            return ModelError(f"{self.path}: cannot be read: {why.strerror or why}")
        return ModelError(f"{self.path}: is no bundle, or a damaged one ({why}); copy it again, or make it again")


# What zipfile and a wrong structure of bundle.json may raise.
_WRONG = (EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError)
_BROKEN = (*_WRONG, OSError, zipfile.BadZipFile, struct.error)


def is_bundle(path: str | Path) -> bool:
    """Whether the file is to be read as a bundle."""
    return Path(path).suffix == ".pum"


# The C interface


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_char_p),
        ("bytes", ctypes.c_uint64),
        ("rank", ctypes.c_uint32),
        ("shape", ctypes.POINTER(ctypes.c_uint64)),
    ]


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Types of pumice.h's functions; AttributeError where one is not there."""
    handle, number, pointer = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p
    for name, result, *arguments in (
        ("pumice_abi", number),
        ("pumice_step_count", number),
        ("pumice_input_count", number),
        ("pumice_output_count", number),
        ("pumice_input", ctypes.POINTER(_Tensor), number),
        ("pumice_output", ctypes.POINTER(_Tensor), number),
        ("pumice_open", ctypes.c_int32, number, ctypes.POINTER(handle), ctypes.c_char_p, ctypes.c_uint64),
        ("pumice_run_steps", ctypes.c_int32, handle, pointer, pointer, number, number),
        ("pumice_verify", ctypes.c_int32, handle, ctypes.POINTER(number)),
        ("pumice_error", ctypes.c_char_p, handle),
        ("pumice_close", None, handle),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


_ERRORS = {1: UsageError, 4: UnsupportedError, 5: MissingDependencyError, 7: DifferenceError}  # pumice_status


def _error(status: int, name: str, message: bytes | None) -> PumiceError:
    text = (message or b"").decode(errors="replace") or f"status {status}"
    return _ERRORS.get(status, PumiceError)(f"{name}: {text}")


# The command


def main(argv: Sequence[str] | None = None) -> int:
    """``loader.py LIBRARY describe|verify|run``; the exit code."""
    parser = argparse.ArgumentParser(prog="loader.py", description="Run a model that Pumice compiled.")
    parser.add_argument("library", metavar="model.so|model.pum")
    parser.add_argument("--threads", type=int, metavar="N", help="default: what the library was compiled for, or one")
    actions = parser.add_subparsers(dest="action", metavar="describe|verify|run", required=True)
    actions.add_parser("describe", help="what it takes and gives; nothing of it is executed")
    actions.add_parser("verify", help="its numbers on this machine against those it was compiled with")
    run = actions.add_parser("run", help="one inference")
    run.add_argument("inputs", metavar="in.npz")
    run.add_argument("outputs", metavar="out.npz")
    args = parser.parse_args(argv)
    try:
        {"describe": _describe, "verify": _verify, "run": _run}[args.action](args)
    except PumiceError as error:
        print(f"loader.py: {clean(str(error))}", file=sys.stderr)
        return error.exit_code
    return 0


def _describe(args: argparse.Namespace) -> None:
    if is_bundle(args.library):
        for variant in Bundle(args.library).variants:
            print(f"{clean(variant.name)}: {describe_target(variant.target)}, {variant.size:,} bytes")
        return
    manifest = read_manifest(args.library)
    print(f"{clean(str(args.library))}: {describe_target(manifest['target'])}")
    for kind, specs in zip(("input", "output"), signature(manifest)):
        for spec in specs:
            print(f"  {kind:<6} {clean(str(spec))}{spec.rounding}")
    sizes = f"{manifest['weights']:,} bytes of weights, {manifest['workspace']:,} of workspace"
    print(f"  {len(manifest['layers'])} layers, {sizes}")


def _verify(args: argparse.Namespace) -> None:
    with load(args.library, args.threads) as model:
        model.verify()
        print(f"{clean(model.library.name)}: every layer gives the numbers that it gave when it was compiled")


def _run(args: argparse.Namespace) -> None:
    try:
        with np.load(args.inputs, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, AttributeError, TypeError) as error:
        raise UsageError(f"{args.inputs}: is not an archive of arrays that numpy.savez writes ({error})") from error
    with load(args.library, args.threads) as model:
        outputs = model(arrays)
    try:
        with zipfile.ZipFile(args.outputs, "w") as archive:
            for name, array in outputs.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, array, allow_pickle=False)
    except OSError as error:
        raise UsageError(f"{args.outputs}: cannot be written: {error.strerror or error}") from error


def describe_target(target: Mapping[str, Any]) -> str:
    """``x86-64-v3 (x86_64 with avx2, fma)``."""
    features = ", ".join(map(str, target["features"]))
    return clean(f"{target['name']} ({target['architecture']}{' with ' * bool(features)}{features})")


def clean(text: str) -> str:
    """``text`` with what a terminal would act on (escape sequences, line breaks, text direction) spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":
    sys.exit(main())
