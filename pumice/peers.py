"""ONNX Runtime, as a user would run it: float32, and int8 as its own static quantization makes it (U8S8, QDQ)."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pumice.artifact import first_line
from pumice.errors import MissingDependencyError, ModelError
from pumice.targets.detect import host_features


class OnnxRuntime:
    """One session, on a fixed number of threads; ``run`` takes and gives arrays by name, as a CompiledModel does."""

    def __init__(self, model: bytes, threads: int) -> None:
        runtime = _runtime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no class but Exception
            raise ModelError(f"ONNX Runtime cannot run the model: {first_line(error)}") from error
        self.outputs = [output.name for output in self._session.get_outputs()]

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One inference."""
        return dict(zip(self.outputs, self._session.run(None, dict(feed)), strict=True))


def read_pinned(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """An ONNX model with its inputs' open dimensions fixed, its external data inside, so that both engines know all.

    Raises ModelError for a file that is no ONNX model or has an input that is not in ``shapes``.
    """
    from pumice.frontend.onnx_file import load_model

    model = _with_weights_inside(*load_model(path))
    given = {tensor.name for tensor in model.graph.initializer}
    for entry in model.graph.input:
        if entry.name in given:
            continue
        if entry.name not in shapes:
            raise ModelError(f"{path}: has an input '{entry.name}' that the compiled library has not")
        for dimension, size in zip(entry.type.tensor_type.shape.dim, shapes[entry.name], strict=False):
            dimension.dim_value = size
    del model.graph.value_info[:]  # what it says of shapes may contradict the fixed ones
    return bytes(model.SerializeToString())


def is_quantized(model: bytes) -> bool:
    """Whether an ONNX model already carries integer layers, which ONNX Runtime then runs as they are."""
    import onnx

    quantized = {"QuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"}
    return any(node.op_type in quantized for node in onnx.load_from_string(model).graph.node)


def quantize_int8(model: bytes, calibration: Mapping[str, np.ndarray], operators: Sequence[str] | None = None) -> bytes:
    """ONNX Runtime's static quantization: uint8 activations, int8 weights per channel, its own preparation first.

    ``calibration`` holds one array an input, cut along its first axis into pieces of the input's first dimension.
    ``operators`` are the ONNX operator types to quantize (None: all that it can).
    """
    _runtime()
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    # Without VNNI its U8S8 product saturates at 16 bits; 7-bit weights are what its documentation prescribes.
    saturates = not host_features() & {"avx512_vnni", "avx_vnni", "asimddp"}
    quiet = logging.getLogger()
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it advises on the root logger about the preparation that it was given
    try:
        with tempfile.TemporaryDirectory(prefix="pumice-") as folder:
            source, prepared, result = (str(Path(folder, f"{name}.onnx")) for name in ("source", "prepared", "int8"))
            Path(source).write_bytes(model)
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                result,
                _reader(quantization.CalibrationDataReader, model, calibration),
                op_types_to_quantize=operators,
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=saturates,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
            return Path(result).read_bytes()
    except ModelError:
        raise
    except Exception as error:  # its errors share no class but Exception
        raise ModelError(f"ONNX Runtime cannot quantize the model: {first_line(error)}") from error
    finally:
        quiet.setLevel(level)


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "ONNX Runtime is needed to compare with it and is not installed: `pip install onnxruntime` "
            "(or `pip install 'pumice[bench]'`)"
        ) from error
    return onnxruntime


def _with_weights_inside(model: Any, source: str, folder: Path | None) -> Any:
    from onnx import external_data_helper, numpy_helper

    from pumice.frontend.onnx_file import read_tensor

    for tensor in model.graph.initializer:
        if external_data_helper.uses_external_data(tensor):
            tensor.CopyFrom(numpy_helper.from_array(read_tensor(tensor, source, folder), tensor.name))
    return model


def _reader(base: type, model: bytes, calibration: Mapping[str, np.ndarray]) -> Any:
    pieces = _pieces(model, calibration)

    class Reader(base):  # type: ignore[misc]
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(pieces, None)

    return Reader()


def _pieces(model: bytes, calibration: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    import onnx

    graph = onnx.load_from_string(model).graph
    given = {tensor.name for tensor in graph.initializer}
    sizes = {e.name: e.type.tensor_type.shape.dim[0].dim_value for e in graph.input if e.name not in given}
    if sizes.keys() != calibration.keys():
        there, wanted = (", ".join(map(repr, names)) or "nothing" for names in (calibration, sizes))
        raise ModelError(f"the calibration data is for {there}, and the inputs of the model are {wanted}")
    count = min(len(array) // sizes[name] for name, array in calibration.items())
    for i in range(count):
        yield {name: array[i * sizes[name] : (i + 1) * sizes[name]] for name, array in calibration.items()}
