"""The definition of Pumice's integer arithmetic, in plain numpy: every kernel on every target equals it exactly.

It shares no code with the rest of the project and is written to be read, not to be fast. Quantized activations
are unsigned or signed bytes ``q`` that stand for ``(q - zero_point) * scale``; weights are signed bytes with a
scale per output channel and no zero point.

A layer does three things:

1.  ``acc = bias_q + sum((x_q - zx) * w_q)``, exactly, in 32 bits; padding reads as ``zx``, that is as zero;
2.  ``y = float32(acc) * m[n]``, one float32 rounding each; with a residual ``r``, added in float32 by a fused
    multiply-add: ``y = fma(float32(acc), m[n], float32(r_q - zr) * mr)``;
3.  ``y_q = clamp(round_half_to_even(y) + zy, lo, hi)``; a ReLU is ``lo = zy``, a ReLU6 also has
    ``hi = quantize(6)``.

With an activation function between 2 and 3, ``m[n] = sx * sw[n]`` and ``mr = sr`` give ``y`` in its own units, and
what is rounded is ``activation(y) * float32(1 / sy)``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_INT32 = np.iinfo(np.int32)


class Residual(NamedTuple):
    """The second operand of a residual add: ``(q - zero_point) * multiplier``, in units of the output."""

    q: np.ndarray  # uint8 or int8, the output's shape
    zero_point: int
    multiplier: float  # scale of the residual / scale of the output, as float32


# Scales to multipliers. They are computed once, at compile time, in float64.


def multiplier(input_scale: float, weight_scale: np.ndarray, output_scale: float = 1.0) -> np.ndarray:
    """``m[n] = sx * sw[n] / sy``, float32: one rounding, at the end."""
    exact = np.float64(input_scale) * np.asarray(weight_scale, np.float64) / np.float64(output_scale)
    return exact.astype(np.float32)


def quantize_bias(bias: np.ndarray, input_scale: float, weight_scale: np.ndarray) -> np.ndarray:
    """``bias_q[n] = round_half_to_even(b / (sx * sw[n]))``, int32, saturated."""
    exact = np.asarray(bias, np.float64) / (np.float64(input_scale) * np.asarray(weight_scale, np.float64))
    return np.clip(np.rint(exact), _INT32.min, _INT32.max).astype(np.int32)


# Between float32 and bytes.


def quantize_u8(x: np.ndarray, scale: float, zero_point: int) -> np.ndarray:
    """``clamp(round_half_to_even(x / scale) + zero_point, 0, 255)`` with a float32 division; NaN gives zero_point."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scaled = np.asarray(x, np.float32) / np.float32(scale)
    return round_to_byte(np.where(np.isnan(scaled), np.float32(0), scaled), zero_point)


def dequantize(q: np.ndarray, scale: float, zero_point: int) -> np.ndarray:
    """``float32(q - zero_point) * scale``, float32."""
    return (q.astype(np.int32) - zero_point).astype(np.float32) * np.float32(scale)


def round_to_byte(y: np.ndarray, zero_point: int, lo: int = 0, hi: int = 255, dtype: type = np.uint8) -> np.ndarray:
    """``clamp(round_half_to_even(y) + zero_point, lo, hi)``; ``y`` float32, which may be infinite."""
    return np.clip(np.rint(y).astype(np.float64) + zero_point, lo, hi).astype(dtype)


# Layers.


def conv_int8(
    x_q: np.ndarray,
    zx: int,
    w_q: np.ndarray,
    bias_q: np.ndarray,
    m: np.ndarray,
    zy: int,
    residual: Residual | None = None,
    lo: int = 0,
    hi: int = 255,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> np.ndarray:
    """Convolution of ``x_q`` [B, C, H, W] with ``w_q`` [N, C/groups, kh, kw]; padding is top, left, bottom, right."""
    acc = conv_accumulate(x_q, zx, w_q, bias_q, stride, padding, dilation, groups)
    return requantize(acc, m.reshape(1, -1, 1, 1), zy, residual, lo, hi)


def linear_int8(
    x_q: np.ndarray,
    zx: int,
    w_q: np.ndarray,
    bias_q: np.ndarray,
    m: np.ndarray,
    zy: int,
    residual: Residual | None = None,
    lo: int = 0,
    hi: int = 255,
) -> np.ndarray:
    """Product of ``x_q`` [..., K] with ``w_q`` [K, N]."""
    return requantize(linear_accumulate(x_q, zx, w_q, bias_q), m, zy, residual, lo, hi)


def conv_accumulate(
    x_q: np.ndarray,
    zx: int,
    w_q: np.ndarray,
    bias_q: np.ndarray,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> np.ndarray:
    """The int32 accumulators of a convolution, [B, N, OH, OW]."""
    batch, channels, height, width = x_q.shape
    n, per_group, kh, kw = w_q.shape
    if channels != per_group * groups or n % groups:
        raise ValueError(f"{channels} channels, {groups} groups and a weight {w_q.shape} do not fit")
    top, left, bottom, right = padding
    oh = (height + top + bottom - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    ow = (width + left + right - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    centred = np.pad(x_q.astype(np.float64) - zx, ((0, 0), (0, 0), (top, bottom), (left, right)))
    acc = np.zeros((batch, groups, n // groups, oh, ow))
    weight = w_q.astype(np.float64).reshape(groups, n // groups, per_group, kh, kw)
    for i in range(kh):
        for j in range(kw):
            y, x = i * dilation[0], j * dilation[1]
            seen = centred[
                :, :, y : y + stride[0] * (oh - 1) + 1 : stride[0], x : x + stride[1] * (ow - 1) + 1 : stride[1]
            ]
            seen = seen.reshape(batch, groups, per_group, oh * ow)
            acc += (weight[:, :, :, i, j] @ seen).reshape(acc.shape)  # float64 holds these integers exactly
    return _to_int32(acc.reshape(batch, n, oh, ow) + bias_q.astype(np.float64).reshape(1, -1, 1, 1))


def linear_accumulate(x_q: np.ndarray, zx: int, w_q: np.ndarray, bias_q: np.ndarray) -> np.ndarray:
    """The int32 accumulators of a matrix product, [..., N]."""
    return _to_int32((x_q.astype(np.float64) - zx) @ w_q.astype(np.float64) + bias_q)


def requantize(
    acc: np.ndarray,
    m: np.ndarray,
    zy: int,
    residual: Residual | None = None,
    lo: int = 0,
    hi: int = 255,
    activation: str | None = None,
    sy: float = 1.0,
) -> np.ndarray:
    """Accumulators to bytes: steps 2 and 3 of a layer; ``m`` broadcasts against ``acc``, ``sy`` is for activations."""
    value = acc.astype(np.float32)
    if residual is None:
        value = value * m.astype(np.float32)
    else:
        other = (residual.q.astype(np.int32) - residual.zero_point).astype(np.float32)
        value = fma32(value, m, other * np.float32(residual.multiplier))
    if activation is not None:
        value = FUNCTIONS[activation](value) * np.float32(1.0 / sy)
    return round_to_byte(value, zy, lo, hi)


def layer_float32(acc: np.ndarray, m: np.ndarray, residual: np.ndarray | None = None) -> np.ndarray:
    """Accumulators to float32, for a layer whose output is not quantized; ``m`` is ``sx * sw[n]``."""
    value = acc.astype(np.float32)
    return value * m.astype(np.float32) if residual is None else fma32(value, m, residual)


# Functions of float32, each operation rounded once.


def exp32(x: np.ndarray) -> np.ndarray:
    """e to the x: the power of two by the rounding of a sum, a polynomial for the rest."""
    f = np.float32
    x = np.clip(np.asarray(x, f), f(-87.33654), f(88.37626))
    shift = f(1.5 * 2**23 + 127)  # the last bits of a sum with it are a biased exponent
    shifted = fma32(x, f(1.44269504088896341), shift)
    rest = fma32(shifted - shift, f(2.12194440e-4), fma32(shifted - shift, f(-0.693359375), x))
    series = f(1.38367921e-3)
    for coefficient in (8.374858602e-3, 4.16682288e-2, 1.666641966e-1, 4.999999206e-1, 1.000000036, 1.0):
        series = fma32(series, rest, f(coefficient))
    return series * (np.ascontiguousarray(shifted).view(np.int32) << 23).view(f)


def sigmoid32(x: np.ndarray) -> np.ndarray:
    """``1 / (1 + exp(-x))``; 0 below -88, where exp ends."""
    x = np.asarray(x, np.float32)
    return np.where(x < -88, np.float32(0), np.float32(1) / (np.float32(1) + exp32(-x)))


def tanh32(x: np.ndarray) -> np.ndarray:
    """``1 - 2 / (exp(2x) + 1)``; within 0.05 of zero ``x - x^3 / 3 + 2 x^5 / 15``."""
    f, x = np.float32, np.asarray(x, np.float32)
    far = f(1) - f(2) / (exp32(x + x) + f(1))
    square = x * x
    near = fma32(fma32(square, f(2 / 15), f(-1 / 3)) * square, x, x)
    return np.where(np.abs(x) < f(0.05), near, far)


def gelu32(x: np.ndarray, tanh: bool = False) -> np.ndarray:
    """``max(x, -4.75) * (1/2 + c * P(c^2 - 11.25))`` with ``c = clip(x, -4.75, 4.75)``."""
    series = _GELU_TANH if tanh else _GELU
    f, x = np.float32, np.asarray(x, np.float32)
    inside = np.clip(x, f(-4.75), f(4.75))
    square, total = fma32(inside, inside, f(-11.25)), f(series[-1])
    for coefficient in reversed(series[:-1]):
        total = fma32(total, square, f(coefficient))
    return np.maximum(x, f(-4.75)) * fma32(inside, total, f(0.5))


_GELU = (
    0.148952842, -0.00655647181, 0.000420940894, -2.84650796e-05, 1.89539105e-06, -1.20865437e-07, 6.62506405e-09,
    -2.95750285e-10, 1.83988397e-11, -1.36958977e-12, 4.42617981e-14,
)  # fmt: skip
_GELU_TANH = (
    0.148975983, -0.00656426698, 0.000421922625, -2.85011884e-05, 1.88682566e-06, -1.1793589e-07, 6.2160459e-09,
    -2.83697038e-10, 2.08379321e-11, -1.59259205e-12, 4.9596371e-14,
)  # fmt: skip


def hard_sigmoid32(x: np.ndarray) -> np.ndarray:
    """``clip(x / 6 + 1/2, 0, 1)``."""
    return np.clip(fma32(x, np.float32(1 / 6), np.float32(0.5)), np.float32(0), np.float32(1))


def hard_swish32(x: np.ndarray) -> np.ndarray:
    """``x * (clip(x + 3, 0, 6) / 6)``, the sixth a product."""
    f, x = np.float32, np.asarray(x, np.float32)
    return x * (np.clip(x + f(3), f(0), f(6)) * f(1 / 6))


def leaky_relu32(x: np.ndarray, slope: float = 0.01) -> np.ndarray:
    """``x``, below zero ``slope * x``."""
    x = np.asarray(x, np.float32)
    return np.where(x < 0, x * np.float32(slope), x)


FUNCTIONS = {
    "nn.leakyrelu": leaky_relu32,
    "tanh": tanh32,
    "sigmoid": sigmoid32,
    "hard_sigmoid": hard_sigmoid32,
    "hard_swish": hard_swish32,
    "nn.silu": lambda x: x * sigmoid32(x),
    "nn.gelu": gelu32,
    "nn.gelu_tanh": lambda x: gelu32(x, tanh=True),
}


def norm32(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray | None, epsilon: float) -> np.ndarray:
    """Layer norm of ``x`` [T, C] over channels, RMS norm if ``beta`` is None: sums in four parts, by channel mod 4."""
    f, x = np.float32, np.asarray(x, np.float32)
    share, channels = f(1.0 / x.shape[1]), x.shape[1]

    def total(terms: np.ndarray, square: bool) -> np.ndarray:
        parts = [np.zeros(len(x), f) for _ in range(4)]
        for c in range(channels):
            parts[c % 4] = fma32(terms[:, c], terms[:, c], parts[c % 4]) if square else parts[c % 4] + terms[:, c]
        return ((parts[0] + parts[1]) + (parts[2] + parts[3]))[:, None]

    centred = x if beta is None else fma32(total(x, False), -share, x)
    scaled = centred * (f(1) / np.sqrt(fma32(total(centred, True), share, f(epsilon))))
    return scaled * gamma if beta is None else fma32(scaled, gamma, beta)


def norm_u8(y: np.ndarray, scale: float, zero_point: int) -> np.ndarray:
    """A norm's result to bytes: ``round_half_to_even(y * float32(1 / scale)) + zero_point``."""
    return round_to_byte(y * np.float32(1.0 / scale), zero_point)


# Operators without weights.


def add_u8(
    a: np.ndarray, za: int, ma: float, b: np.ndarray, zb: int, mb: float, zy: int, lo: int = 0, hi: int = 255
) -> np.ndarray:
    """``a + b`` with ``ma = sa / sy`` and ``mb = sb / sy``: ``fma(a - za, ma, (b - zb) * mb)``."""
    left = (a.astype(np.int32) - za).astype(np.float32)
    right = (b.astype(np.int32) - zb).astype(np.float32) * np.float32(mb)
    return round_to_byte(fma32(left, np.float32(ma), right), zy, lo, hi)


def maxpool_u8(
    x_q: np.ndarray,
    pool: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> np.ndarray:
    """Maximum over windows of ``x_q`` [B, C, H, W]; the scale stays, and padding never wins."""
    return (
        _windows(x_q.astype(np.int64), np.iinfo(np.int64).min, pool, stride, padding, dilation)[0]
        .max(0)
        .astype(x_q.dtype)
    )


def avgpool_u8(
    x_q: np.ndarray,
    zx: int,
    scale_ratio: float,
    zy: int,
    pool: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    count_include_pad: bool = True,
    lo: int = 0,
    hi: int = 255,
) -> np.ndarray:
    """Mean over windows: ``float32(sum(x_q - zx)) * float32(sx / (sy * count))``; ``scale_ratio`` is ``sx / sy``."""
    values, inside = _windows(x_q.astype(np.int64) - zx, 0, pool, stride, padding, (1, 1))
    count = pool[0] * pool[1] if count_include_pad else inside.sum(0)
    m = (np.float64(scale_ratio) / count).astype(np.float32)
    return round_to_byte(_to_int32(values.sum(0)).astype(np.float32) * m, zy, lo, hi)


# Exact pieces.


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c`` in float32 with one rounding.

    The product of two float32 is exact in float64. The sum is taken in float64 rounded to odd, which a second
    rounding to float32 cannot tell from the exact sum: Boldo and Melquiond, "Emulation of FMA and correctly
    rounded sums: proved algorithms using rounding to odd", IEEE Transactions on Computers 57(4), 2008. The
    error term is Knuth's TwoSum.
    """
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        product = np.asarray(a, np.float32).astype(np.float64) * np.asarray(b, np.float32).astype(np.float64)
        addend = np.asarray(c, np.float32).astype(np.float64)
        product, addend = np.broadcast_arrays(product, addend)
        total = product + addend
        part = total - product
        error = (product - (total - part)) + (addend - part)
        even = (np.ascontiguousarray(total).view(np.int64) & 1) == 0
        inexact = np.isfinite(total) & (error != 0)
        odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        return np.where(inexact & even, odd, total).astype(np.float32)


def _to_int32(acc: np.ndarray) -> np.ndarray:
    if acc.size and (acc.max() > _INT32.max or acc.min() < _INT32.min):
        raise OverflowError("an accumulator leaves 32 bits")
    return acc.astype(np.int32)


def _windows(
    x: np.ndarray,
    fill: int,
    pool: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """The taps of every window, ``[taps, B, C, OH, OW]``, and which of them lie inside the image."""
    top, left, bottom, right = padding
    edges = ((0, 0), (0, 0), (top, bottom), (left, right))
    oh = (x.shape[2] + top + bottom - dilation[0] * (pool[0] - 1) - 1) // stride[0] + 1
    ow = (x.shape[3] + left + right - dilation[1] * (pool[1] - 1) - 1) // stride[1] + 1
    padded = np.pad(x, edges, constant_values=fill)
    real = np.pad(np.ones(x.shape, np.int64), edges)
    taps, inside = [], []
    for i in range(pool[0]):
        for j in range(pool[1]):
            rows = slice(i * dilation[0], i * dilation[0] + stride[0] * (oh - 1) + 1, stride[0])
            columns = slice(j * dilation[1], j * dilation[1] + stride[1] * (ow - 1) + 1, stride[1])
            taps.append(padded[:, :, rows, columns])
            inside.append(real[:, :, rows, columns])
    return np.stack(taps), np.stack(inside)
