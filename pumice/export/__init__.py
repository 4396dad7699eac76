"""Out of Pumice again: a module in its form as a file that others run."""

from pumice.export.onnx_model import export_onnx, write_onnx

__all__ = ["export_onnx", "write_onnx"]
