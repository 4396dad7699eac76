"""Masks that come beside a model: side files of 0/1 arrays, and ``*_orig`` / ``*_mask`` pairs in a state dict."""

from __future__ import annotations

import difflib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from tvm.ir import IRModule

from pumice.errors import ModelError
from pumice.module import mask_sources_of, source_of, weights_of, with_mask_sources, with_weights

# One byte for each weight of the largest models meant here, several times over; a file that claims more is damaged
# or a bomb.
_MAX_BYTES = 512 << 20


def read_masks(path: str | Path) -> dict[str, np.ndarray]:
    """The masks of a ``.safetensors`` or ``.npz`` side file: weight name -> boolean array of the weight's shape.

    True (1) keeps a weight, False (0) prunes it. Raises ModelError for a file that cannot be read without running
    code (object arrays), is damaged, or holds a value other than 0 and 1.
    """
    path = Path(path)
    arrays = _read_arrays(path)
    return {name: _as_mask(array, name, path.name) for name, array in arrays.items()}


def apply_masks(mod: IRModule, masks: Mapping[str, np.ndarray], origin: str = "given masks") -> IRModule:
    """``mod`` with each named weight 0 where its mask is; all other values keep their bits.

    ``masks``: weight name -> array of 0 and 1 in the shape of the weight as it was read (so apply them before any
    pass transposes it). ``origin`` says where the masks are from and is recorded for each weight:
    ``mask_sources_of(mod)``. Raises ModelError, naming the weight, for a name that the model does not have, for
    another shape and for values that are not 0 and 1.
    """
    model = source_of(mod)
    weights = dict(weights_of(mod))
    for name, array in masks.items():
        if name not in weights:
            near = difflib.get_close_matches(name, weights, n=3)
            known = f"{', '.join(map(repr, list(weights)[:8]))}{', ...' if len(weights) > 8 else ''}"
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"its weights are {known or 'none'}"
            raise ModelError(f"{origin}: {model} has no weight '{name}'; {hint}")
        mask = _as_mask(np.asarray(array), name, origin)
        weight = weights[name]
        if mask.shape != weight.shape:
            raise ModelError(
                f"{origin}: the mask of '{name}' has the shape {_shown(mask.shape)}, the weight {_shown(weight.shape)}"
            )
        weights[name] = _zeroed(weight, mask)
    return with_mask_sources(with_weights(mod, weights), {**mask_sources_of(mod), **{name: origin for name in masks}})


def fold_masks_in_state_dict(state: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """``conv.weight_orig, conv.weight_mask -> conv.weight``: the plain state dict, and the masks by plain name.

    ``state``: names to arrays (or CPU tensors). Entries without a partner stay as they are; masked positions become
    exactly 0, all others keep their bits. Raises ModelError for a mask of another shape or with other values than 0
    and 1, and where the plain name is there as well.
    """
    plain: dict[str, np.ndarray] = {}
    masks: dict[str, np.ndarray] = {}
    for name, value in state.items():
        stem = name.removesuffix("_orig") if name.endswith("_orig") else name.removesuffix("_mask")
        if stem == name or not {f"{stem}_orig", f"{stem}_mask"} <= state.keys():
            plain[name] = _array(value)
            continue
        if stem in state:
            raise ModelError(f"the state dict has both '{stem}' and '{stem}_orig': keep one of the two")
        if stem in masks:
            continue
        original, mask = _array(state[f"{stem}_orig"]), _as_mask(_array(state[f"{stem}_mask"]), stem, "the state dict")
        if mask.shape != original.shape:
            raise ModelError(
                f"the state dict: the mask of '{stem}' has the shape {_shown(mask.shape)}, the weight"
                f" {_shown(original.shape)}"
            )
        plain[stem], masks[stem] = _zeroed(original, mask), mask
    return plain, masks


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a ``.safetensors`` state dict by name, as they are stored. ModelError for any other file."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ModelError(
            f"{path.name}: a state dict is read from a .safetensors file only, because others can run code when they"
            " are read; write it with safetensors.torch.save_file"
        )
    return _read_arrays(path)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ModelError(f"{path.name}: {'is a folder' if path.is_dir() else 'does not exist'}")
    if path.stat().st_size == 0:
        raise ModelError(f"{path.name}: the file is empty")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    raise ModelError(f"{path.name}: masks are read from .safetensors and .npz files, not from '{path.suffix}'")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                try:
                    arrays[name] = file.get_tensor(name)
                except (TypeError, AttributeError) as error:  # bfloat16 and float8, which numpy does not have
                    dtype = file.get_slice(name).get_dtype()
                    raise ModelError(
                        f"{path.name}: '{name}' is stored as {dtype}; store it as float32 or bool"
                    ) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path.name}: is not a sound .safetensors file ({error})") from error
    return arrays


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > _MAX_BYTES:
                raise ModelError(f"{path.name}: unpacks to more than {_MAX_BYTES >> 20} MB; store masks as bool")
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name in arrays:
                    raise ModelError(f"{path.name}: '{name}' is there twice")
                with archive.open(member) as stream:
                    arrays[name] = _read_npy(stream, member.file_size, name, path.name)
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, ValueError, MemoryError) as error:
        raise ModelError(f"{path.name}: is not a whole .npz file ({error or type(error).__name__})") from error
    return arrays


def _read_npy(stream: IO[bytes], size: int, name: str, file: str) -> np.ndarray:
    """One array, after its header was held against its size: numpy allocates what a header claims."""
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(stream)
    if dtype.hasobject:
        raise ModelError(f"{file}: '{name}' holds Python objects, which could run code when read; store a bool array")
    count = 1
    for extent in shape:
        count *= extent
    if any(extent < 0 for extent in shape) or count * dtype.itemsize != size - stream.tell():
        raise ModelError(f"{file}: '{name}' claims the shape {_shown(shape)} but has other bytes")
    data = np.frombuffer(stream.read(), dtype)
    return data.reshape(shape, order="F" if fortran else "C")


def _as_mask(array: np.ndarray, name: str, where: str) -> np.ndarray:
    if array.dtype == np.bool_:
        return array
    if array.dtype.kind not in "fiu":
        raise ModelError(f"{where}: the mask of '{name}' is of type {array.dtype}; it must hold 0 and 1")
    other = array[(array != 0) & (array != 1)]
    if other.size:
        raise ModelError(f"{where}: the mask of '{name}' holds {other.flat[0]}; it must hold 0 and 1")
    return np.asarray(array != 0)


def _zeroed(weight: np.ndarray, mask: np.ndarray) -> np.ndarray:
    # Not a product: that makes -0.0 of negative weights, and NaN of infinite ones.
    return np.where(mask, weight, weight.dtype.type(0))


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.detach() if hasattr(value, "detach") else value)


def _shown(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
