"""Read an ONNX file and its tensors without trusting them: sizes before memory, and no path out of its folder."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from pumice.errors import ModelError, UnsupportedError
from pumice.frontend.onnx_graph import quote

_PROTOBUF_LIMIT = 2**31  # bytes; protobuf itself cannot read more
_AXIS_LIMIT = 32  # NumPy's own, before version 2
_ELEMENT_LIMIT = 2**33  # of one tensor: far above any weight, far below what wraps around in int64 arithmetic

# Where each element type is kept when it is not in raw_data: the field, and how many entries an element takes.
_TYPED_FIELDS = {
    TensorProto.FLOAT: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.UINT64: "uint64_data",
    TensorProto.INT32: "int32_data",
    TensorProto.INT16: "int32_data",
    TensorProto.UINT16: "int32_data",
    TensorProto.INT8: "int32_data",
    TensorProto.UINT8: "int32_data",
    TensorProto.BOOL: "int32_data",
    TensorProto.FLOAT16: "int32_data",
    TensorProto.BFLOAT16: "int32_data",
}


def load_model(source: str | Path | onnx.ModelProto) -> tuple[onnx.ModelProto, str, Path | None]:
    """The parsed model, the name that messages call it by, and the folder that its external data must lie in.

    External data is not read here. Raises ModelError for what is not a readable ONNX file.
    """
    if isinstance(source, onnx.ModelProto):
        return source, source.graph.name or "the ONNX model", None
    path = Path(source)
    name = quote(path.name)[1:-1]
    if path.is_dir():
        raise ModelError(f"{name} is a folder, not an ONNX file; give the path of the .onnx file inside it.")
    if not path.is_file():
        raise ModelError(f"The model file {name} does not exist; check the path.")
    size = path.stat().st_size
    if size == 0:
        raise ModelError(f"{name} is empty (0 bytes); export or download it again.")
    if size >= _PROTOBUF_LIMIT:
        raise ModelError(
            f"{name} has {size} bytes, and protobuf reads at most {_PROTOBUF_LIMIT - 1}; "
            "save the model with external data."
        )
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise ModelError(
            f"{name} is not an ONNX model, or it is truncated ({error}); export or download it again."
        ) from error
    if not model.ir_version or not model.HasField("graph") or not model.graph.output:
        raise ModelError(f"{name} is not an ONNX model: it has no graph; export or download it again.")
    return model, name, path.parent


def read_tensor(tensor: TensorProto, source: str, folder: Path | None) -> np.ndarray:
    """The values of a tensor, after its element type, extents and byte count were found to agree.

    Raises ModelError for a tensor that contradicts itself or points out of ``folder``, UnsupportedError for
    an element type that has no use here (strings, 4-bit and 8-bit floats).
    """
    place = f"The tensor {quote(tensor.name)} of {source}"
    if tensor.data_type not in _TYPED_FIELDS:
        raise UnsupportedError(
            f"{place} has the element type {_type_name(tensor.data_type)}, which cannot be compiled; "
            "export the model in float32, or quantized to int8."
        )
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    shape = tuple(tensor.dims)
    if len(shape) > _AXIS_LIMIT or any(extent < 0 for extent in shape) or math.prod(shape) > _ELEMENT_LIMIT:
        raise ModelError(f"{place} declares the impossible shape {list(shape)[:8]}; the file is damaged.")
    if tensor.data_location == TensorProto.EXTERNAL:
        return _read_external(tensor, place, folder, dtype, shape)
    count = math.prod(shape)
    if tensor.HasField("raw_data"):
        held, wanted, unit = len(tensor.raw_data), count * dtype.itemsize, "bytes"
    else:
        held, wanted, unit = len(getattr(tensor, _TYPED_FIELDS[tensor.data_type])), count, "values"
    if held != wanted:
        raise ModelError(
            f"{place} holds {held} {unit} but its shape {list(shape)} of {dtype} takes {wanted}; "
            "the file is damaged, export it again."
        )
    return np.asarray(numpy_helper.to_array(tensor))


def read_sparse_tensor(tensor: onnx.SparseTensorProto, source: str, folder: Path | None) -> np.ndarray:
    """A coordinate-format tensor made dense; the order of its entries does not matter.

    Raises ModelError for indices out of range or given twice.
    """
    place = f"The sparse tensor {quote(tensor.values.name)} of {source}"
    shape = tuple(tensor.dims)
    if not 0 < len(shape) <= _AXIS_LIMIT or any(extent < 1 for extent in shape) or math.prod(shape) > _ELEMENT_LIMIT:
        raise ModelError(f"{place} declares the impossible shape {list(shape)[:8]}; the file is damaged.")
    values = read_tensor(tensor.values, source, folder)
    indices = read_tensor(tensor.indices, source, folder)
    if indices.dtype != np.int64 or values.ndim != 1 or indices.shape not in {values.shape, (values.size, len(shape))}:
        raise ModelError(
            f"{place} has indices of shape {list(indices.shape)} for {values.size} values of a "
            f"{len(shape)}-dimensional tensor; the file is damaged."
        )
    limits = np.array([math.prod(shape)] if indices.ndim == 1 else shape)
    rows = indices.reshape(values.size, -1)
    if values.size and ((rows < 0) | (rows >= limits)).any():
        raise ModelError(f"{place} has an index outside its shape {list(shape)}; the file is damaged.")
    flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), shape)
    if len(np.unique(flat)) != len(flat):
        raise ModelError(f"{place} gives two values for one index; the file is damaged.")
    dense = np.zeros(math.prod(shape), values.dtype)
    dense[flat] = values
    return dense.reshape(shape)


def _read_external(
    tensor: TensorProto, place: str, folder: Path | None, dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray:
    wanted = math.prod(shape) * dtype.itemsize
    fields = {entry.key: entry.value for entry in tensor.external_data if entry.key in {"location", "offset", "length"}}
    path = _external_path(fields.get("location", ""), place, folder)
    offset = _byte_count(fields.get("offset", "0"), "offset", place)
    length = _byte_count(fields.get("length", str(wanted)), "length", place)
    size = path.stat().st_size
    if length != wanted:
        raise ModelError(f"{place} takes {wanted} bytes but declares {length} of external data; the file is damaged.")
    if offset + length > size:
        raise ModelError(
            f"{place} reads up to byte {offset + length} of {quote(path.name)}, which has {size}; "
            "the external data is truncated, fetch it again."
        )
    with path.open("rb") as stream:
        stream.seek(offset)
        return np.fromfile(stream, dtype, math.prod(shape)).reshape(shape)


def _external_path(location: str, place: str, folder: Path | None) -> Path:
    if folder is None:
        raise ModelError(
            f"{place} has its data in another file, and a model in memory has no folder to look in; "
            "load the external data first, or give the path of the .onnx file."
        )
    outside = ModelError(
        f"{place} has its data at {quote(location)}, which is not a plain path inside the model's folder; "
        "such a path is not followed."
    )
    if not location or "\0" in location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise outside
    path = folder / location
    # The real path decides, so that a symbolic link cannot lead out.
    if not path.resolve().is_relative_to(folder.resolve()):
        raise outside
    if not path.is_file():
        raise ModelError(f"{place} has its data in {quote(location)}, which is missing beside the model; fetch it too.")
    # A hard link may name any file of this disk; from inside it cannot be told from an honest copy.
    if path.stat().st_nlink > 1:
        raise ModelError(f"{place} has its data in {quote(location)}, which is a hard link; replace it by a copy.")
    return path.resolve()


def _byte_count(text: str, what: str, place: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ModelError(f"{place} has the {what} {quote(text)} of its external data, not a count of bytes.")
    return int(text)


def _type_name(element: int) -> str:
    known = element in TensorProto.DataType.values()
    return TensorProto.DataType.Name(element).lower() if known else f"number {element}"
