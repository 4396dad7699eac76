"""A pass that moves the outliers among an activation's channels into the weights that read it: SmoothQuant.

A tensor has one scale, and a few channels of a transformer's activations are ten to a hundred times wider than the
rest, which are left with a handful of the 256 values. A layer's weight has a scale for each output channel, and its
input channels are about equally wide. So each channel is divided by a factor where the tensor is made, and multiplied
by it where it is read. Both are done in the weights, and what the model computes stays the same.

Source: Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models
(arXiv 2211.10438).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from math import ceil

import numpy as np
import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.errors import UsageError
from pumice.module import layers_of, weights_of, with_layers, with_weights
from pumice.passes.calibrate import Affine, Samples
from pumice.passes.dataflow import Dataflow, operands
from pumice.passes.equalize import find_streams, is_scalable, produced, scaled
from pumice.passes.evaluate import Evaluator
from pumice.passes.layers import Layer, find_layers
from pumice.passes.observers import affine_uint8
from pumice.passes.padding import real_positions, token_mask
from pumice.passes.quantization_plan import QuantizeSpec, plan_quantization
from pumice.passes.rewriting import Rewriter, rewrite, shape_of
from pumice.passes.rounding import rounded_tensor, rounded_weight
from pumice.passes.views import view

# What the search tries; besides, leaving the tensor as it is.
STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

_LARGEST_FACTOR = 64.0  # beyond the typical channel's: what is wider on other inputs than on the samples must not drown
_ROWS = 1024  # positions of a tensor that the search rounds
_NORMS = ("nn.layer_norm", "nn.rms_norm")
_MOVES = ("reshape", "flatten", "squeeze", "expand_dims", "permute_dims", "strided_slice", "split")


@tvm.transform.module_pass(opt_level=0, name="SmoothActivations")
class SmoothActivations:
    """Divide the channels that linear layers read by factors that their weights take over.

    Before::

        x = layer_norm(h, gamma, beta)
        q, k, v = matmul(x, wq), matmul(x, wk), matmul(x, wv)
        r = add(x, attention(q, k, v))

    After, for a factor ``s`` per channel of ``x``::

        x = layer_norm(h, gamma, beta)
        xs = layer_norm(h, gamma / s, beta / s)
        q, k, v = matmul(xs, s * wq), matmul(xs, s * wk), matmul(xs, s * wv)
        r = add(x, attention(q, k, v))

    The first norm is there only where something but layers reads ``x``, as in a network that normalizes behind its
    residual adds. ``rms_norm`` likewise. Where ``x`` is made of a layer's output by nothing but ReLU, products, moves
    and attention (of which it is the values), that layer's output channels, with their bias, are divided by ``s``.

    ``s_j = max|x_j|^a / max|w_j|^(1 - a)`` over all samples and all readers, scaled to a geometric mean of 1 and held
    within [1/64, 64]; padding tokens do not count. ``strength`` is ``a`` in [0, 1], or ``"search"``: for each tensor
    that of ``STRENGTHS`` (or none) with the least error at its readers' outputs, after tensor and weights are rounded
    to bytes. Zero weights stay zero. What ``EqualizeChannels`` scales, streams between layers, is left to it.

    ``samples`` are as for ``Calibrate``; at most ``limit`` of them, evenly spread, are run. Raises UsageError for
    another strength, ModelError where the samples do not fit the model.
    """

    def __init__(self, samples: Mapping[str, np.ndarray], strength: float | str = 0.5, limit: int = 256) -> None:
        if strength != "search" and not (isinstance(strength, int | float) and 0 <= strength <= 1):
            raise UsageError(f"strength {strength!r} of smoothing is neither a number from 0 to 1 nor 'search'")
        self.samples = samples
        self.strength = strength
        self.limit = limit

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Run the samples, scale the weights, split the norms that others read."""
        graph = Dataflow(mod)
        found = find_smoothable(mod, graph)
        if not found:
            return mod
        seen = self._observe(mod, found)
        before = weights_of(mod)
        weights, records = dict(before), layers_of(mod)
        norms: dict[relax.Var, tuple[Smoothable, np.ndarray]] = {}
        for one in found:
            read = [before[layer.weight.name] for layer in one.readers]
            strength, factors = self._choose(one, seen[one.tensor], read)
            if strength is None:
                continue
            for layer in one.readers:
                weights[layer.weight.name] = scaled(weights[layer.weight.name], factors, 0)
                if layer.name in records:
                    records[layer.name].notes.append(_note(factors, strength))
            if one.source is None:
                norms[one.tensor] = one, factors
            else:
                of_source = np.ones(_width(one.source.var))
                of_source[one.channels] = factors
                for name, axis in produced(graph, one.source):
                    weights[name] = scaled(weights[name], 1 / of_source, axis)
        mod = with_layers(with_weights(mod, weights), records)
        return rewrite(mod, _Smoother(graph, norms).visit) if norms else mod

    def _observe(self, mod: IRModule, found: list[Smoothable]) -> dict[relax.Var, Observed]:
        tensors = [one.tensor for one in found]
        evaluator, mask = Evaluator(mod, tensors), token_mask(mod)
        samples = Samples(mod, self.samples)
        chosen = list(islice(samples, 0, None, ceil(len(samples) / self.limit)))
        seen = {tensor: Observed(ceil(_ROWS / len(chosen))) for tensor in tensors}
        for sample in chosen:
            real = None if mask is None else np.asarray(sample[mask], bool)
            for tensor, value in zip(tensors, evaluator.observe(sample, tensors), strict=True):
                seen[tensor].add(real_positions(value, real))
        return seen

    def _choose(self, one: Smoothable, seen: Observed, weights: list[np.ndarray]) -> tuple[float | None, np.ndarray]:
        """The strength, None for no smoothing, and the factor of each channel."""
        if not isinstance(self.strength, str):
            return self.strength, smoothing_factors(seen.largest, weights, self.strength, one.channels)
        plain = np.ones(len(one.channels))
        best: tuple[float | None, np.ndarray] = None, plain
        least = rounding_error(one.readers, weights, seen, plain)
        for strength in STRENGTHS:
            factors = smoothing_factors(seen.largest, weights, strength, one.channels)
            error = rounding_error(one.readers, weights, seen, factors)
            if error < least:
                least, best = error, (strength, factors)
        return best


@dataclass(frozen=True)
class Smoothable:
    """A tensor whose channels may be divided by factors.

    tensor: ``[..., C]``, what the readers read. channels: the source's channel that each of the C is. source: the layer
    that makes them, None where the tensor is a norm's result.
    """

    tensor: relax.Var
    readers: list[Layer]
    channels: np.ndarray
    source: Layer | None = None


@dataclass
class Observed:
    """What samples show of a tensor: the range of each channel, and some rows."""

    rows_of_sample: int
    low: np.ndarray | float = 0.0
    high: np.ndarray | float = 0.0
    _rows: list[np.ndarray] = field(default_factory=list)

    def add(self, rows: np.ndarray) -> None:
        """Take in ``[positions, C]``."""
        self.low = np.minimum(self.low, rows.min(0))
        self.high = np.maximum(self.high, rows.max(0))
        self._rows.append(rows[:: ceil(len(rows) / self.rows_of_sample)].copy())

    @property
    def rows(self) -> np.ndarray:
        """float32 ``[about 1024, C]``."""
        return np.concatenate(self._rows)

    @property
    def largest(self) -> np.ndarray:
        """``[C]``: the largest magnitude of each channel."""
        return np.maximum(np.abs(self.low), np.abs(self.high))


def smoothing_factors(
    largest: np.ndarray, weights: list[np.ndarray], strength: float, channels: np.ndarray
) -> np.ndarray:
    """``[C]``: what each channel is divided by; the same for channels that are one channel of their source.

    ``largest [C]`` are the magnitudes that the channels reach, ``weights`` the readers' ``[C, N]``. A channel that
    was never active is as wide as the typical one, and so is one that no weight reads.
    """
    width = int(channels.max()) + 1
    reached, read = np.zeros(width), np.zeros(width)
    np.maximum.at(reached, channels, largest)
    np.maximum.at(read, channels, np.max([np.abs(weight).max(1, initial=0) for weight in weights], axis=0))
    alive = (reached > 0) & (read > 0) & np.isfinite(reached)
    factors = np.ones(width)
    if alive.any():
        logarithms = strength * np.log(reached[alive]) - (1 - strength) * np.log(read[alive])
        limit = np.log(_LARGEST_FACTOR)
        factors[alive] = np.exp(np.clip(logarithms - logarithms.mean(), -limit, limit))
        # Nothing reads such a channel, but it would still widen the tensor's range.
        unread = (reached > 0) & (read == 0) & np.isfinite(reached)
        factors[unread] = np.maximum(1, reached[unread] / np.median(reached[alive] / factors[alive]))
    result: np.ndarray = factors[channels]
    return result


def rounding_error(layers: list[Layer], weights: list[np.ndarray], seen: Observed, factors: np.ndarray) -> float:
    """Noise over signal of the readers' outputs, summed, with tensor and weights rounded after smoothing."""
    low, high = float((seen.low / factors).min()), float((seen.high / factors).max())
    rows = seen.rows.astype(np.float64)
    rounded = rounded_tensor(rows / factors, Affine(*affine_uint8(low, high)))
    total = 0.0
    for layer, weight in zip(layers, weights, strict=True):
        exact = rows @ weight
        noise = exact - rounded @ rounded_weight(layer, weight * factors[:, None])
        signal = float(np.square(exact).sum())
        total += float(np.square(noise).sum()) / signal if signal > 0 else 0.0
    return total


def find_smoothable(mod: IRModule, graph: Dataflow) -> list[Smoothable]:
    """The tensors that will be rounded for linear layers and can be smoothed, in execution order."""
    rounded = set(plan_quantization(mod, QuantizeSpec()).tensors)
    equalized = {tensor for stream in find_streams(mod, graph) for tensor in stream.tensors}
    own = [layer for layer in find_layers(mod) if is_scalable(layer, graph)]
    results = {graph.biased(layer.var): layer for layer in own if layer.operator == "linear"}
    readers: dict[relax.Var, list[Layer]] = {}
    for layer in own:
        if layer.operator == "linear" and layer.data in rounded - equalized:
            readers.setdefault(layer.data, []).append(layer)
    found = []
    for tensor, those in readers.items():
        if _is_norm(graph, tensor):
            found.append(Smoothable(tensor, those, np.arange(_width(tensor))))
        elif len(those) == len(graph.users[tensor]) and tensor not in graph.outputs:
            origin = _origin(graph, tensor, results)
            if origin is not None:
                found.append(Smoothable(tensor, those, origin[1], origin[0]))
    return found


def _is_norm(graph: Dataflow, tensor: relax.Var) -> bool:
    """Whether it is a norm over the last axis with known parameters, one number a channel."""
    if graph.op(tensor) not in _NORMS:
        return False
    call, shape = graph.value[tensor], shape_of(tensor)
    known = all(p in graph.weights or not isinstance(p, relax.Var) for p in call.args[1:])
    plain = graph.op(tensor) == "nn.rms_norm" or (call.attrs.center and call.attrs.scale)
    is_last = [int(axis) % len(shape) for axis in call.attrs.axes] == [len(shape) - 1]
    return bool(known and plain and is_last and all(shape_of(p) == shape[-1:] for p in call.args[1:]))


def _origin(graph: Dataflow, tensor: relax.Var, results: Mapping[relax.Var, Layer]) -> tuple[Layer, np.ndarray] | None:
    """The layer whose output channels ``tensor`` is made of, and which is which; None where there is no such layer.

    Whatever else reads the values on the way must read other channels.
    """
    here, channels = tensor, np.arange(_width(tensor))
    path: set[tuple[relax.Var | None, relax.Var]] = {(user, tensor) for user in graph.users[tensor]}
    while True:
        source = view(here, graph.value.get).source
        moved = _channels(graph, here, source)
        if moved is None:
            return None
        channels = moved[channels]
        for user, operand in _leaves(graph, source):
            if (user, operand) not in path:
                seen = None if user is None else _channels(graph, operand, source)
                if seen is None or not set(seen).isdisjoint(channels):
                    return None
        if source in results:
            return results[source], channels
        operand = _scaled_operand(graph, source, results)
        if operand is None:
            return None
        here, path = operand, {(source, operand)}


def _scaled_operand(graph: Dataflow, var: relax.Var, results: Mapping[relax.Var, Layer]) -> relax.Var | None:
    """The operand whose channels, multiplied by positive factors, multiply those of ``var``; None if there is none."""
    operator = graph.op(var)
    if not operator:
        return None
    call = graph.value[var]
    if operator in ("nn.attention", "nn.attention_bias"):
        candidates = [call.args[2]]
    elif operator in ("nn.relu", "nn.leakyrelu"):
        candidates = [call.args[0]]
    elif operator == "multiply":  # of a gated product the side that is a layer's plain result
        sides = [side for side in graph.activation_operands(var) if shape_of(side) == shape_of(var)]
        candidates = [side for side in sides if view(side, graph.value.get).source in results]
    else:
        return None
    fit = [c for c in candidates if operands(call).count(c) == 1 and shape_of(c)[2:] == shape_of(var)[2:]]
    return next((candidate for candidate in fit if candidate in graph.activations), None)


def _leaves(graph: Dataflow, var: relax.Var) -> Iterator[tuple[relax.Var | None, relax.Var]]:
    """Who reads ``var``, seen through moves, and in which moved form; None stands for the model's outputs."""
    if var in graph.outputs:
        yield None, var
    for user in graph.users[var]:
        if graph.op(user) in _MOVES or isinstance(graph.value[user], relax.TupleGetItem):
            yield from _leaves(graph, user)
        else:
            yield user, var


def _channels(graph: Dataflow, moved: relax.Var, source: relax.Var) -> np.ndarray | None:
    """Which channel of ``source`` each channel of its view is; None where that depends on the position."""
    columns = view(moved, graph.value.get).index.reshape(-1, _width(moved)) % _width(source)
    return columns[0] if (columns == columns[0]).all() else None


def _width(var: relax.Var) -> int:
    """Channels of ``[N, C]``, ``[batch, tokens, C]`` or ``[batch, tokens, heads, C]``, heads by channels there."""
    shape = shape_of(var)
    return int(np.prod(shape[2:])) if len(shape) > 2 else shape[-1]


class _Smoother:
    """Divides norms' parameters, in a norm of its own where others read the result."""

    def __init__(self, graph: Dataflow, norms: Mapping[relax.Var, tuple[Smoothable, np.ndarray]]) -> None:
        self.graph = graph
        self.norms = norms
        self.smoothed: dict[relax.Var, relax.Expr] = {}  # by the layer that reads it

    def visit(self, rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        """Rewrite a norm, or let a layer read its smoothed form."""
        if var in self.smoothed:
            return relax.op.matmul(self.smoothed[var], value.args[1])
        if var not in self.norms:
            return None
        one, factors = self.norms[var]
        data, *parameters = value.args
        divided_ = [rewriter.derived([p], (rewriter.array(p) / factors).astype(np.float32)) for p in parameters]
        norm = relax.Call(value.op, [data, *divided_], value.attrs, value.ty_args)
        readers = [layer.var for layer in one.readers]
        if set(self.graph.users[var]) == set(readers) and var not in self.graph.outputs:
            return norm
        smoothed = rewriter.emit(norm, "smoothed")
        self.smoothed.update(dict.fromkeys(readers, smoothed))
        return None


def _note(factors: np.ndarray, strength: float) -> str:
    return f"input smoothed with strength {strength:g}: channels divided by {factors.min():.3g} to {factors.max():.3g}"
