"""What the zeros of a weight look like: how many, and in which pattern; and the pass that writes it down."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm
from tvm.ir import IRModule

from pumice.module import layers_of, mask_sources_of, weight_vars_of, weights_of, with_layers
from pumice.passes.layers import Layer, find_layers
from pumice.passes.rewriting import bindings_of, op_name
from pumice.record import LayerRecord


@tvm.transform.module_pass(opt_level=0, name="pumice.RecordLayers")
class RecordLayers:
    """Start, or bring up to date, the record of every layer: shape, work, bytes, and the zeros of its weight."""

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Store ``describe(mod)`` in the module."""
        return with_layers(mod, describe(mod))


@dataclass(frozen=True)
class Zeros:
    """The zeros of one weight."""

    pattern: str  # dense, unstructured, 1x4, 4x1, 4x4, N:M
    sparsity: float  # share of zero weights
    block_sparsity: float  # share of 1x4 blocks that are all zero


# Fewer zeros than this are what training and rounding to int8 leave behind (a few percent), and nothing gains by them.
_DENSE_BELOW = 0.10
# A block pattern explains the zeros if at least this share of them lies in all-zero blocks ...
_EXPLAINED = 0.90
# ... and the blocks that are left are at least this full. Weights that are zero independently of each other with
# probability s never pass both: blocks of four hold s^3 of the zeros, so the first asks for s > 0.96, where the
# blocks that are left are only 1 / (1 + s + s^2 + s^3) = 26 % full. (With one of the two tests alone a random 99 %
# or a random 5 % would pass for blocks.) What is left open forgives weights that rounding to int8 made zero.
_FULL = 0.75
_BLOCKS = {"4x4": (4, 4), "1x4": (1, 4), "4x1": (4, 1)}
_GROUPS = [(n, m) for m in (2, 4, 8, 16) for n in range(1, m)]
_STRAY_GROUPS = 0.001  # share of groups with more than N weights left that N:M forgives


def classify_zeros(rows: np.ndarray) -> Zeros:
    """The most structured pattern that explains the zeros of ``rows [N, taps, C]``.

    From most to least structured: 4x4 blocks (output by input channels), 1x4, 4x1, N:M along the input channels
    (at most N of M neighbours left), unstructured, dense.
    """
    zero = rows == 0
    sparsity = float(zero.mean()) if zero.size else 0.0
    block_sparsity = float(zero_blocks(zero, 1, 4).mean()) if zero.size else 0.0
    return Zeros(_pattern(zero, sparsity), sparsity, block_sparsity)


def zero_blocks(zero: np.ndarray, height: int, width: int) -> np.ndarray:
    """Which blocks of ``zero [N, taps, C]`` (booleans) are all zero: ``[ceil(N / height), taps, ceil(C / width)]``.

    The last block along an axis is as short as it has to be.
    """
    if height > 1:
        zero = np.logical_and.reduceat(zero, np.arange(0, zero.shape[0], height), axis=0)
    if width > 1:
        whole = zero.shape[2] // width * width  # several times faster than reduceat along the last axis
        blocks = zero[:, :, :whole].reshape(*zero.shape[:2], -1, width).all(axis=-1)
        rest = zero[:, :, whole:].all(axis=-1, keepdims=True) if whole < zero.shape[2] else zero[:, :, :0]
        zero = np.concatenate([blocks, rest], axis=2)
    return zero


def describe(mod: IRModule) -> dict[str, LayerRecord]:
    """A record of every layer, by name; what earlier stages wrote into the module's records is kept."""
    weights, known, masks = weights_of(mod), layers_of(mod), mask_sources_of(mod)
    biases = _biases(mod)
    zeros: dict[str, Zeros] = {}
    records = {}
    for layer in find_layers(mod):
        weight = layer.weight.name
        shape = tuple(int(d) for d in layer.weight.ty.shape)
        record = known.get(layer.name)
        if record is None:
            record = LayerRecord(layer.name, layer.operator, weight, shape)
            record.source_bytes = sum(weights[n].nbytes for n in (weight, biases.get(layer.var.name)) if n in weights)
        record.operator, record.weight, record.shape, record.macs = layer.operator, weight, shape, layer.macs
        if weight in weights:
            found = zeros.setdefault(weight, classify_zeros(layer.to_rows(weights[weight])))
            record.pattern, record.sparsity, record.block_sparsity = (
                found.pattern,
                found.sparsity,
                found.block_sparsity,
            )
            record.pruned_by = record.pruned_by or masks.get(weight) or _found(found)
        records[layer.name] = record
    return records


def is_depthwise(layer: Layer) -> bool:
    """Whether each output channel reads one input channel, so that there are no neighbours to make a block of."""
    return layer.operator == "conv2d" and int(layer.weight.ty.shape[1]) == 1


def _found(zeros: Zeros) -> str:
    return "" if zeros.pattern == "dense" else "zeros found"


def _biases(mod: IRModule) -> dict[str, str]:
    """The bias's name by the name of the layer's result."""
    weights = {var.name for var in weight_vars_of(mod)}
    return {
        str(value.args[0].name): str(value.args[1].name)
        for _, value in bindings_of(mod)
        if op_name(value) == "relax.add"
        and all(isinstance(arg, tvm.relax.Var) for arg in value.args)
        and value.args[1].name in weights
    }


def _pattern(zero: np.ndarray, sparsity: float) -> str:
    if sparsity < _DENSE_BELOW:
        return "dense"
    for pattern, (height, width) in _BLOCKS.items():
        if _has_blocks(zero, height, width):
            return pattern
    for n, m in _GROUPS:
        if _has_groups(zero, n, m):
            return f"{n}:{m}"
    return "unstructured"


def _has_blocks(zero: np.ndarray, height: int, width: int) -> bool:
    if (height > 1 and zero.shape[0] == 1) or (width > 1 and zero.shape[2] == 1):
        return False  # a block of one weight explains everything and means nothing
    blocks = zero_blocks(zero, height, width)
    inside = int(_expand(blocks, height, width, zero.shape).sum())
    kept = int((~zero).sum())
    return inside >= _EXPLAINED * int(zero.sum()) and kept >= _FULL * (zero.size - inside)


def _expand(blocks: np.ndarray, height: int, width: int, shape: tuple[int, ...]) -> np.ndarray:
    return blocks.repeat(height, axis=0).repeat(width, axis=2)[: shape[0], :, : shape[2]]


def _has_groups(zero: np.ndarray, n: int, m: int) -> bool:
    """Whether of any M neighbouring input channels at most N are left, and nearly N: else sparser is also N:M."""
    whole = zero.shape[2] // m * m
    if whole == 0:
        return False
    left = m - zero[:, :, :whole].reshape(-1, m).sum(axis=1)
    return bool((left > n).mean() <= _STRAY_GROUPS and left.mean() >= 0.9 * n)
