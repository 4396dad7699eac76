"""Rounding to bytes and back, in numpy: what passes simulate to see what quantization would cost."""

from __future__ import annotations

import numpy as np

from pumice.passes.calibrate import Affine
from pumice.passes.layers import Layer
from pumice.passes.quantization_plan import quantize_rows, symmetric_scale


def rounded_tensor(values: np.ndarray, affine: Affine) -> np.ndarray:
    """``values``, rounded to uint8 with this scale and zero point, as float again; beyond its range they saturate."""
    stored = np.clip(np.rint(values / affine.scale) + affine.zero_point, 0, 255)
    result: np.ndarray = (stored - affine.zero_point) * affine.scale
    return result


def rounded_weight(layer: Layer, weight: np.ndarray) -> np.ndarray:
    """The layer's float weight, rounded to int8 with a scale for each output channel, as float64 again."""
    scale = symmetric_scale(layer, weight).astype(np.float64)
    return dequantized_weight(layer, quantize_rows(layer, weight, scale), scale)


def dequantized_weight(layer: Layer, stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """int8 values times the scales ``[N]`` (or one) of the layer's output channels, float64."""
    shape = [1] * stored.ndim
    shape[layer.channel_axis] = -1
    result: np.ndarray = stored.astype(np.float64) * np.asarray(scale, np.float64).reshape(shape)
    return result
