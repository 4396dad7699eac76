"""A pass that runs the float model on samples and keeps the range of every tensor that will be quantized."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.errors import ModelError, UsageError
from pumice.module import inputs_of, source_of
from pumice.passes.dataflow import Dataflow
from pumice.passes.evaluate import SharedEvaluator
from pumice.passes.observers import OBSERVERS, Observer, affine_uint8
from pumice.passes.padding import real_positions, token_mask
from pumice.passes.quantization_plan import QuantizeSpec, plan_quantization

_RANGES = "pumice.ranges"
_LARGEST_UNPACKED = 2**30  # a packed file beyond this must not unpack to many times its size
_LARGEST_RATIO = 100


class Affine(NamedTuple):
    """``(q - zero_point) * scale``, uint8."""

    scale: float
    zero_point: int


@tvm.transform.module_pass(opt_level=0, name="Calibrate")
class Calibrate:
    """Keep in ``pumice.ranges`` the scale and zero point of each tensor that ``Quantize`` will round to bytes.

    ``samples`` holds one array per input, cut along its first axis into pieces of that input's first dimension:
    ``[300, 3, 224, 224]`` for an input of ``1x3x224x224`` is 300 samples. They are run one at a time.
    ``method`` is one of minmax, percentile, entropy, mse (see ``observers``); ``progress(done, total)`` is called
    after each sample. Padding tokens (see ``padding``) do not count. The graph itself stays as it is. ``evaluator``
    is what other passes run the same module with.
    """

    def __init__(
        self,
        samples: Mapping[str, np.ndarray],
        method: str = "percentile",
        spec: QuantizeSpec | None = None,
        progress: Callable[[int, int], None] | None = None,
        evaluator: SharedEvaluator | None = None,
    ) -> None:
        """Raises UsageError for an unknown method."""
        if method not in OBSERVERS:
            raise UsageError(f"no calibration method {method!r}; there are {', '.join(OBSERVERS)}")
        self.samples = samples
        self.method = method
        self.spec = spec or QuantizeSpec()
        self.progress = progress
        self.evaluator = evaluator or SharedEvaluator()

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Run the samples. Raises ModelError where they do not fit the model or a tensor is not finite on them."""
        samples = Samples(mod, self.samples)
        plan = plan_quantization(mod, self.spec)
        if not plan.tensors:
            return mod
        names = Dataflow(mod).names
        watched = list(dict.fromkeys(tensor for group in plan.observed.values() for tensor in group))
        observers = {tensor: OBSERVERS[self.method](names[tensor]) for tensor in watched}
        self._run(mod, samples, observers)
        ranges = {}
        for tensor, group in plan.observed.items():
            ends = [observers[member].range() for member in group]
            ranges[names[tensor]] = Affine(*affine_uint8(min(lo for lo, _ in ends), max(hi for _, hi in ends)))
        return with_ranges(mod, ranges)

    def _run(self, mod: IRModule, samples: Samples, observers: dict[relax.Var, Observer]) -> None:
        evaluator, mask = self.evaluator.of(mod, list(observers)), token_mask(mod)
        for done, sample in enumerate(samples, start=1):
            values = evaluator.observe(sample, list(observers))
            real = None if mask is None else np.asarray(sample[mask], bool)
            for observer, value in zip(observers.values(), values, strict=True):
                try:
                    observer.observe(real_positions(value, real) if value.ndim else value)
                except ModelError as error:
                    raise ModelError(f"{source_of(mod)}: calibration sample {done}: {error}") from None
            if self.progress is not None:
                self.progress(done, len(samples))


def read_calibration(path: str | Path, mod: IRModule) -> dict[str, np.ndarray]:
    """The arrays of a ``.npz`` file, one per input of ``mod``, checked against it. Nothing in it is executed.

    Raises ModelError naming the file: not a ``.npz``, no array for an input or one of the wrong type or shape,
    pickled objects, an archive that unpacks to far more than its size.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > _LARGEST_UNPACKED and unpacked > _LARGEST_RATIO * path.stat().st_size:
            raise ModelError(f"{path}: unpacks to {unpacked:,} bytes, over {_LARGEST_RATIO} times its own size")
        with np.load(path, allow_pickle=False) as stored:
            _check_names(stored.files, mod, str(path))
            arrays = {name: stored[name] for name in stored.files}
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except zipfile.BadZipFile as error:
        raise ModelError(f"{path}: not an .npz file (numpy.savez writes one, with an array per input)") from error
    except (ValueError, EOFError, KeyError, zlib.error) as error:
        raise ModelError(f"{path}: an array in it cannot be read: {error}") from error
    Samples(mod, arrays, str(path))
    return arrays


class Samples:
    """Calibration arrays checked against a model, as a sequence of inputs for it."""

    def __init__(self, mod: IRModule, arrays: Mapping[str, np.ndarray], source: str = "the calibration data") -> None:
        """Raises ModelError: a missing or unknown name, a wrong type or shape, no sample, NaN or infinity."""
        _check_names(list(arrays), mod, source)
        self._arrays = {}
        self._pieces = {}
        for var in inputs_of(mod):
            shape = tuple(int(d) for d in var.ty.shape)
            array = _checked(np.asarray(arrays[var.name]), var.name, shape, str(var.ty.dtype), source)
            self._arrays[var.name] = array
            self._pieces[var.name] = shape
        counts = {name: _count(array, self._pieces[name]) for name, array in self._arrays.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{count} for {name!r}" for name, count in counts.items())
            raise ModelError(f"{source}: the inputs have different numbers of samples: {listed}")
        self._count = next(iter(counts.values()), 0)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for i in range(self._count):
            yield {name: self._piece(name, i) for name in self._arrays}

    def _piece(self, name: str, i: int) -> np.ndarray:
        shape = self._pieces[name]
        rows = shape[0] if shape else 1
        return self._arrays[name][i * rows : (i + 1) * rows].reshape(shape)


def ranges_of(mod: IRModule) -> dict[str, Affine]:
    """The ranges that calibration found, by variable name; empty before it."""
    if not (mod.attrs and _RANGES in mod.attrs):
        return {}
    stored = json.loads(str(mod.attrs[_RANGES]))
    return {name: Affine(float(scale), int(zero_point)) for name, (scale, zero_point) in stored.items()}


def with_ranges(mod: IRModule, ranges: Mapping[str, Affine]) -> IRModule:
    """``mod`` with these ranges."""
    return mod.with_attr(_RANGES, json.dumps(ranges))


def without_ranges(mod: IRModule) -> IRModule:
    """``mod`` with its ranges forgotten: they are by variable name, and hold for one graph."""
    return mod.without_attr(_RANGES) if mod.attrs and _RANGES in mod.attrs else mod


def _check_names(names: list[str], mod: IRModule, source: str) -> None:
    wanted = [var.name for var in inputs_of(mod)]
    for name in wanted:
        if name not in names:
            there = ", ".join(map(repr, names)) or "no array at all"
            raise ModelError(f"{source}: no array for input {name!r} of {source_of(mod)}; there is {there}")
    for name in names:
        if name not in wanted:
            expected = ", ".join(map(repr, wanted))
            raise ModelError(f"{source}: array {name!r} is no input of {source_of(mod)}, whose inputs are {expected}")


def _checked(array: np.ndarray, name: str, shape: tuple[int, ...], dtype: str, source: str) -> np.ndarray:
    """The array in the input's own type; raises ModelError with what does not fit."""
    where = f"{source}: array {name!r}"
    want = np.dtype(dtype)
    if array.dtype != want and not (array.dtype.kind == want.kind and want.kind in "iuf"):
        raise ModelError(f"{where} is {array.dtype}, and the input is {want}; convert it as for the model itself")
    fits = array.ndim == max(len(shape), 1) and array.shape[1:] == shape[1:]
    if not fits:
        given, piece = _times(array.shape), _times(("N", *shape[1:]))
        raise ModelError(f"{where} has shape {given}, and samples of the input stack to {piece}")
    rows = shape[0] if shape else 1
    if array.size == 0 or rows == 0:
        raise ModelError(f"{where} holds no sample")
    if array.shape[0] % rows:
        raise ModelError(
            f"{where} has {array.shape[0]} rows, not a multiple of the input's first dimension {rows}; "
            f"cut it to {array.shape[0] // rows * rows}"
        )
    with np.errstate(over="ignore"):
        converted = array.astype(want, copy=False)
    if want.kind == "f" and not np.isfinite(converted).all():
        index = ", ".join(str(i) for i in np.argwhere(~np.isfinite(converted))[0])
        raise ModelError(f"{where} has NaN or infinity in {want}, first at index {index}")
    if want.kind in "iu" and not np.array_equal(converted, array):
        raise ModelError(f"{where} is {array.dtype} with values that do not fit the input's {want}")
    return converted


def _count(array: np.ndarray, shape: tuple[int, ...]) -> int:
    return int(array.shape[0]) // (shape[0] if shape else 1)


def _times(shape: tuple[int | str, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
