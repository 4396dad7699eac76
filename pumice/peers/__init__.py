"""Other engines, to compare with: each runs an ONNX model, in float32 or int8, on so many threads or a GPU."""

from pumice.peers.model import is_quantized, read_pinned
from pumice.peers.onnxruntime import OnnxRuntime
from pumice.peers.openvino import OpenVino
from pumice.peers.quantization import quantize_int8

PEERS: dict[str, type[OnnxRuntime] | type[OpenVino]] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}

__all__ = ["PEERS", "OnnxRuntime", "OpenVino", "is_quantized", "quantize_int8", "read_pinned"]
