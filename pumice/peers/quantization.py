"""ONNX Runtime's static quantization (QDQ), in the form that an engine runs fastest: U8S8 on CPUs, S8S8 on GPUs."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pumice.artifact import first_line
from pumice.errors import ModelError
from pumice.peers.onnxruntime import import_onnxruntime
from pumice.targets.detect import host_features


def quantize_int8(
    model: bytes,
    calibration: Mapping[str, np.ndarray],
    operators: Sequence[str] | None = None,
    on_gpu: bool = False,
) -> bytes:
    """ONNX Runtime's static quantization: uint8 activations, int8 weights per channel, its own preparation first.

    ``calibration`` holds one array an input, cut along its first axis into pieces of the input's first dimension.
    ``operators`` are the ONNX operator types to quantize (None: all that it can). ``on_gpu``: as TensorRT wants it,
    with int8 activations, no zero points, and biases in float.
    """
    import_onnxruntime()
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    # Without VNNI its U8S8 product saturates at 16 bits; 7-bit weights are what its documentation prescribes.
    saturates = not on_gpu and not host_features() & {"avx512_vnni", "avx_vnni", "asimddp"}
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
                activation_type=quantization.QuantType.QInt8 if on_gpu else quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                extra_options={"ActivationSymmetric": True, "QuantizeBias": False} if on_gpu else {},
            )
            return Path(result).read_bytes()
    except ModelError:
        raise
    except Exception as error:  # its errors share no class but Exception
        raise ModelError(f"ONNX Runtime cannot quantize the model: {first_line(error)}") from error
    finally:
        quiet.setLevel(level)


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
