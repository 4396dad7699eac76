"""The single layers whose speed is measured, as QDQ ONNX models that take and give uint8."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PATTERNS = {"1x4": 1, "4x4": 4}  # output channels that share a block's place
BLOCK = 4  # neighbouring input channels
_SEED = 20240817
_X_SCALE, _W_SCALE, _ZERO_POINT = 0.02, 0.01, 128


@dataclass(frozen=True)
class LayerShape:
    """A linear layer on ``positions`` rows, or a stride-1 convolution with a square kernel on a square map."""

    inputs: int
    outputs: int
    positions: int
    kernel: int | None = None  # None: linear

    @property
    def name(self) -> str:
        """As tables and plots call it."""
        if self.kernel is None:
            return f"linear {self.positions} x {self.inputs} -> {self.outputs}"
        side = self.side
        return f"conv {self.kernel}x{self.kernel}, {side} x {side}, {self.inputs} -> {self.outputs}"

    @property
    def side(self) -> int:
        """Width and height of a convolution's map."""
        return round(self.positions**0.5)

    @property
    def macs(self) -> int:
        """Multiply-adds if no weight is zero."""
        return self.positions * self.inputs * self.outputs * (self.kernel or 1) ** 2

    def weight(self, zeros: float = 0.0, rows: int = 1) -> np.ndarray:
        """int8 ``[outputs, inputs, kernel, kernel]`` (linear: kernel 1) with this share of its rows x 4 blocks zero.

        Which blocks is random; ``rows`` output channels share them.
        """
        draw = np.random.default_rng(_SEED)
        shape = (self.outputs // rows, rows, self.inputs // BLOCK, BLOCK, self.kernel or 1, self.kernel or 1)
        weight = draw.integers(1, 128, shape, dtype=np.int8) * draw.choice(np.array([-1, 1], np.int8), shape)
        lists = shape[0], 1, shape[2], 1, *shape[4:]
        is_zero = np.zeros(lists, bool)
        is_zero.ravel()[draw.permutation(is_zero.size)[: round(zeros * is_zero.size)]] = True
        return np.where(is_zero, np.int8(0), weight).reshape(self.outputs, self.inputs, *shape[4:])

    def plane(self, channels: int, channels_last: bool) -> tuple[int, ...]:
        """The shape of an activation."""
        if self.kernel is None:
            return self.positions, channels
        return (1, self.side, self.side, channels) if channels_last else (1, channels, self.side, self.side)

    def model(self, weight: np.ndarray, channels_last: bool = False) -> onnx.ModelProto:
        """``x`` uint8 -> dequantize -> the layer -> quantize -> ``y`` uint8: what one layer is inside a network.

        ``channels_last`` has ``x`` and ``y`` of a convolution as most engines lay them out inside: the transposes
        that this adds to the model cancel theirs.
        """
        n = self.outputs
        spread = _X_SCALE * _W_SCALE * 74 * 73 * float(np.sqrt(weight[0].size))  # of the outputs of a dense weight
        constants = {
            "x_scale": np.float32(_X_SCALE),
            "zero": np.uint8(_ZERO_POINT),
            "weight": weight if self.kernel else np.ascontiguousarray(weight[:, :, 0, 0].T),
            "w_scale": np.full(n, _W_SCALE, np.float32),
            "w_zero": np.zeros(n, np.int8),
            "bias": np.random.default_rng(_SEED).integers(-1000, 1000, n, dtype=np.int32),
            "b_scale": np.full(n, _X_SCALE * _W_SCALE, np.float32),
            "b_zero": np.zeros(n, np.int32),
            "y_scale": np.float32(3 * spread / 128),
        }
        channel = 0 if self.kernel else 1
        layer = (
            helper.make_node("Gemm", ["xf", "wf", "bf"], ["yf"])
            if self.kernel is None
            else helper.make_node("Conv", ["xf", "wf", "bf"], ["yf"], pads=[self.kernel // 2] * 4)
        )
        nodes = [
            helper.make_node("DequantizeLinear", ["xq", "x_scale", "zero"], ["xf"]),
            helper.make_node("DequantizeLinear", ["weight", "w_scale", "w_zero"], ["wf"], axis=channel),
            helper.make_node("DequantizeLinear", ["bias", "b_scale", "b_zero"], ["bf"], axis=0),
            layer,
            helper.make_node("QuantizeLinear", ["yf", "y_scale", "zero"], ["yq"]),
        ]
        if self.kernel is not None and channels_last:
            first = helper.make_node("Transpose", ["x"], ["xq"], perm=[0, 3, 1, 2])
            last = helper.make_node("Transpose", ["yq"], ["y"], perm=[0, 2, 3, 1])
            nodes = [first, *nodes, last]
        else:
            nodes[0].input[0], nodes[-1].output[0] = "x", "y"
        graph = helper.make_graph(
            nodes,
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.UINT8, self.plane(self.inputs, channels_last))],
            [helper.make_tensor_value_info("y", TensorProto.UINT8, self.plane(n, channels_last))],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


LAYERS = {
    shape.name: shape
    for shape in (
        LayerShape(768, 3072, 128),
        LayerShape(3072, 768, 128),
        LayerShape(768, 768, 128),
        LayerShape(4096, 4096, 1),
        LayerShape(1024, 1024, 1),
        LayerShape(64, 256, 56 * 56, 1),
        LayerShape(256, 1024, 14 * 14, 1),
        LayerShape(128, 128, 28 * 28, 3),
        LayerShape(512, 512, 7 * 7, 3),
    )
}
