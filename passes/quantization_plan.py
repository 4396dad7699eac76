"""Deciding what is quantized: which layers compute in int8, which tensors are rounded to bytes, and who reads them.

The decision needs no numbers but the weights', so calibration (which tensors to watch) and quantization (where
to put quantize and dequantize) make the same plan from the same module.

The plan is made backwards, from readers to producers. A tensor is *wanted* as bytes when a reader computes on
bytes: an int8 layer, a pool or residual add whose own result is wanted, or an operator that only moves values
around (reshape, max pool, concat) whose result is wanted. A wanted tensor is *fully* quantized, so that its
float form need not be stored, when it comes out of a layer's epilogue and no reader needs it exact. Layer
normalization, softmax and the model's outputs do: so the residual stream of a transformer stays float, and that
of a convolutional network does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.errors import UsageError
from pumice.module import source_of, weights_of
from pumice.passes.dataflow import Dataflow
from pumice.passes.layers import Layer, find_layers

# They move or select values: quantizing before is quantizing after, with one scale.
COMMUTING = {
    "nn.max_pool2d", "reshape", "flatten", "nn.batch_flatten", "permute_dims", "squeeze", "expand_dims", "concat",
    "strided_slice", "split", "nn.pixel_shuffle", "flip",
}  # fmt: skip
_AVERAGES = {"nn.avg_pool2d", "nn.adaptive_avg_pool2d", "mean"}
_CLAMPS = {"nn.relu", "clip"}  # a quantized range's own clamp
AFFINE = {"add", "subtract", "multiply", "divide"}
# One value in, one value out: a layer's epilogue computes them in registers.
POINTWISE = {
    *_CLAMPS, *AFFINE, "maximum", "minimum", "sigmoid", "tanh", "exp", "erf", "negative", "abs", "sqrt", "power",
    "square", "nn.gelu", "nn.gelu_tanh", "nn.silu", "nn.leakyrelu", "nn.prelu", "nn.softplus", "nn.selu",
}  # fmt: skip

_WEIGHT_SCALES = "pumice.weight_scales"
ACCUMULATOR_LIMIT = 2**31 - 2**24  # what the products may sum to: int32, less room for the bias


@dataclass(frozen=True)
class QuantizeSpec:
    """What the user decides about quantization."""

    keep_float: tuple[str, ...] = ()  # layer name patterns (``*``, ``?``, ``[...]``) that stay float
    reasons: Mapping[str, str] = field(default_factory=dict)  # more layers that do, by their full names, and why


@dataclass
class QuantizationPlan:
    """What will be quantized."""

    layers: list[Layer] = field(default_factory=list)  # to compute in int8
    float_reasons: dict[str, str] = field(default_factory=dict)  # layers that stay as they are, and why
    tensors: list[relax.Var] = field(default_factory=list)  # to be quantized, in execution order
    observed: dict[relax.Var, list[relax.Var]] = field(default_factory=dict)  # tensor -> whose ranges it unites
    _full: set[relax.Var] = field(default_factory=set)
    _wanted_by: set[tuple[relax.Var, relax.Var]] = field(default_factory=set)

    def reads_quantized(self, tensor: relax.Var, reader: relax.Var) -> bool:
        """Whether the binding of ``reader`` reads the dequantized bytes of ``tensor``, not its float form."""
        return tensor in self._full or (tensor, reader) in self._wanted_by


def plan_quantization(mod: IRModule, spec: QuantizeSpec) -> QuantizationPlan:
    """The plan for a simplified module. Layers that are already quantized are not in it.

    Raises UsageError where a pattern of ``keep_float`` names no layer: a typing error must not quantize one.
    """
    graph = Dataflow(mod)
    plan = QuantizationPlan()
    layers = find_layers(mod)
    _check_patterns(spec, layers, source_of(mod))
    weights = weights_of(mod)
    reasons = {layer.name: _why_float(layer, layers, graph, weights, spec) for layer in layers}
    _spread_over_shared_weights(layers, reasons)
    for layer in layers:
        reason = reasons[layer.name]
        if reason is None:
            plan.layers.append(layer)
        elif reason:
            plan.float_reasons[layer.name] = reason
    _Planner(graph, layers, plan).run()
    return plan


def weight_scales_of(mod: IRModule) -> dict[str, np.ndarray]:
    """The scales that weights were rounded by already, float32 for each output channel, by the weight's name."""
    if not (mod.attrs and _WEIGHT_SCALES in mod.attrs):
        return {}
    return {str(name): np.from_dlpack(scale) for name, scale in mod.attrs[_WEIGHT_SCALES].items()}


def with_weight_scales(mod: IRModule, scales: Mapping[str, np.ndarray]) -> IRModule:
    """``mod`` with exactly these scales of weights."""
    kept = {name: tvm.runtime.tensor(np.ascontiguousarray(scale)) for name, scale in scales.items()}
    return mod.with_attr(_WEIGHT_SCALES, kept) if kept else mod.without_attr(_WEIGHT_SCALES)


def accumulator_bound(layer: Layer, weight_q: np.ndarray) -> np.ndarray:
    """The largest magnitude that each output channel's sum of products reaches, over all inputs and zero points.

    With ``P`` and ``N`` the sums of a channel's positive and negative weights in magnitude, the products of
    bytes lie in ``[-255 N, 255 P]``, and less a zero point in 0..255 within ``255 max(P, N)``.
    """
    rows = layer.to_rows(weight_q).astype(np.int64)
    positive = np.where(rows > 0, rows, 0).sum((1, 2))
    negative = np.where(rows < 0, -rows, 0).sum((1, 2))
    bound: np.ndarray = 255 * np.maximum(positive, negative)
    return bound


def symmetric_scale(layer: Layer, weight: np.ndarray) -> np.ndarray:
    """``max|w| / 127`` per output channel, float32 and never denormal; 1 where a channel is all zero."""
    largest = np.abs(layer.to_rows(weight)).max((1, 2), initial=0).astype(np.float64)
    return np.where(largest > 0, np.maximum(largest / 127, np.finfo(np.float32).tiny), 1).astype(np.float32)


def quantize_rows(layer: Layer, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The weight as int8 in [-127, 127]; zeros stay zero."""
    shape = [1] * weight.ndim
    shape[layer.channel_axis] = -1
    with np.errstate(under="ignore"):
        quantized: np.ndarray = np.clip(np.rint(weight / scale.reshape(shape)), -127, 127).astype(np.int8)
    return quantized


def _check_patterns(spec: QuantizeSpec, layers: list[Layer], source: str) -> None:
    for pattern in spec.keep_float:
        if not any(fnmatchcase(layer.name, pattern) for layer in layers):
            names = ", ".join(layer.name for layer in layers[:8])
            known = f"{names}{', ...' if len(layers) > 8 else ''}" or "none"
            raise UsageError(f"keep float '{pattern}' names no layer of {source}; its layers are {known}")


def _why_float(
    layer: Layer, layers: list[Layer], graph: Dataflow, weights: dict[str, np.ndarray], spec: QuantizeSpec
) -> str | None:
    """Why a layer is not quantized: None if it is, empty if it already was."""
    if layer.weight_scale is not None:
        return "" if graph.op(layer.data) == "dequantize" else "only its weight was quantized in the model"
    if str(layer.data.ty.dtype) != "float32" or str(layer.weight.ty.dtype) != "float32":
        return f"computes in {layer.data.ty.dtype} with a weight in {layer.weight.ty.dtype}, not in float32"
    pattern = next((p for p in spec.keep_float if fnmatchcase(layer.name, p)), None)
    if pattern is not None:
        return f"kept float by the pattern {pattern!r}"
    if layer.name in spec.reasons:
        return spec.reasons[layer.name]
    if layer.data not in graph.activations:
        return "its data is a constant"
    if graph.op(layer.data) == "dequantize":
        return "its data was quantized in the model, its weight was not (or with a zero point)"
    if 0 in weights[layer.weight.name].shape:
        return "its weight is empty"
    readers = {one.var for one in layers if one.weight == layer.weight}
    others = [user for user in graph.users[layer.weight] if user not in readers]
    if others:
        return f"its weight is also read by {graph.op(others[0]) or 'an output'} in float"
    weight = weights[layer.weight.name]
    if weight.size * 255 * 127 > ACCUMULATOR_LIMIT:  # some channel might; look
        bound = int(accumulator_bound(layer, quantize_rows(layer, weight, symmetric_scale(layer, weight))).max())
        if bound > ACCUMULATOR_LIMIT:
            return f"its sums may reach {bound:,}, beyond the int32 accumulator"
    return None


def _spread_over_shared_weights(layers: list[Layer], reasons: dict[str, str | None]) -> None:
    """A weight has one form: where one of the layers that share it stays float, all do."""
    for layer in layers:
        for other in layers:
            if other.weight == layer.weight and reasons[layer.name] and reasons[other.name] is None:
                reasons[other.name] = f"shares its weight with {layer.name}, which stays float"


class _Planner:
    """One backward walk over the graph."""

    def __init__(self, graph: Dataflow, layers: list[Layer], plan: QuantizationPlan) -> None:
        self.graph = graph
        self.plan = plan
        self.layers = {layer.var for layer in layers}
        self.int8 = {layer.var: layer for layer in plan.layers}
        self.quantized: set[relax.Var] = set()
        self.exact: set[relax.Var] = set()  # tensors that some reader needs in float
        self.residual: set[tuple[relax.Var, relax.Var]] = set()
        self.bytelike: dict[relax.Var, bool] = {}
        self.tied: dict[relax.Var, list[relax.Var]] = {}  # tensor -> the tensors whose scale it must share

    def run(self) -> None:
        for tensor in reversed(self.graph.order):
            if tensor in self.graph.activations:
                self._decide(tensor)
        self.plan.tensors = [tensor for tensor in self.graph.order if tensor in self.quantized]
        self.plan.observed = self._unite_scales()

    def _decide(self, tensor: relax.Var) -> None:
        readers = self._readers(tensor)
        if tensor in self.graph.outputs or any(self._needs_exact(reader) for reader in readers):
            self.exact.add(tensor)
        if not _is_float(tensor) or self.graph.op(tensor) == "dequantize":
            return
        wanting = [reader for reader in readers if self._wants_bytes(reader, tensor)]
        if not wanting:
            return
        self.quantized.add(tensor)
        self.plan._wanted_by.update((tensor, reader) for reader in wanting)
        for reader in wanting:
            if self._commutes(reader):
                self.tied.setdefault(tensor, []).append(reader)
        if tensor not in self.exact and self._computed_on_bytes(tensor):
            self.plan._full.add(tensor)
            self._plan_residual_add(tensor)

    def _readers(self, tensor: relax.Var) -> list[relax.Var]:
        """Who reads a tensor, a split's parts in place of the split."""
        readers: list[relax.Var] = []
        for user in self.graph.users[tensor]:
            readers += self.graph.users[user] if self.graph.op(user) == "split" else [user]
        return readers

    def _needs_exact(self, reader: relax.Var) -> bool:
        """Whether rounding what ``reader`` reads to bytes would lose what a float operator needs."""
        if reader in self.layers or self._averages_positions(reader) or reader in self.plan._full:
            return False
        if self._commutes(reader) or self._operator(reader) in POINTWISE:
            return reader in self.exact
        return True

    def _wants_bytes(self, reader: relax.Var, tensor: relax.Var) -> bool:
        if reader in self.int8:
            return bool(self.int8[reader].data == tensor)
        if (tensor, reader) in self.residual:
            return True
        if reader not in self.quantized:
            return False
        if self._commutes(reader):
            # A value that some reader needs exact is rounded after it was moved, not before.
            return reader in self.plan._full or reader not in self.exact
        if self._averages_positions(reader):
            return self._computed_on_bytes(tensor)
        # A clamp or a scale and shift usually ends a layer's epilogue; behind a pool or a concat it reads bytes.
        simple = self._operator(reader) in _CLAMPS | AFFINE and self.graph.activation_operands(reader) == [tensor]
        moved = self._commutes(tensor) or self._averages_positions(tensor)
        return simple and moved and reader in self.plan._full

    def _plan_residual_add(self, tensor: relax.Var) -> None:
        """Want the operands of ``[relu|clip](add(a, b))``, except the one that the add is fused into.

        That one is the result of a layer (with its bias) that nothing else reads: the later one if both are,
        for its epilogue can only add what was computed before.
        """
        added = self._before_clamps(tensor)
        operands = self.graph.activation_operands(added)
        if self._operator(added) != "add" or len(operands) != 2:
            return
        shape = list(added.ty.shape)
        if any(list(operand.ty.shape) != shape or not self._computed_on_bytes(operand) for operand in operands):
            return
        results = {self.graph.biased(layer) for layer in self.int8}
        fused = [o for o in operands if o in results and self.graph.only_user(o) is not None]
        last = max(fused, key=self.graph.order.__getitem__, default=None)
        self.residual.update((operand, added) for operand in operands if operand is not last)

    def _before_clamps(self, tensor: relax.Var) -> relax.Var:
        while self._operator(tensor) in _CLAMPS:
            before = self.graph.activation_operands(tensor)
            if len(before) != 1 or self.graph.only_user(before[0]) is None:
                return tensor
            tensor = before[0]
        return tensor

    def _computed_on_bytes(self, tensor: relax.Var) -> bool:
        """Whether a tensor comes from layers (or the model's inputs) by nothing but moves, pools and epilogues."""
        if tensor not in self.bytelike:
            if tensor in self.layers or tensor in self.graph.inputs or self.graph.op(tensor) == "dequantize":
                answer = True
            elif self._commutes(tensor) or self._operator(tensor) in POINTWISE or self._averages_positions(tensor):
                answer = all(self._computed_on_bytes(operand) for operand in self.graph.activation_operands(tensor))
            else:
                answer = False
            self.bytelike[tensor] = answer
        return self.bytelike[tensor]

    def _operator(self, var: relax.Var) -> str:
        """The operator behind a variable; for a part of a split, ``split``."""
        value = self.graph.value.get(var)
        if isinstance(value, relax.TupleGetItem):
            var = value.tuple_value
            return "split" if self.graph.op(var) == "split" else ""
        return self.graph.op(var)

    def _commutes(self, var: relax.Var) -> bool:
        operator = self._operator(var)
        if operator == "image.resize2d":
            return bool(self.graph.value[var].attrs.method == "nearest_neighbor")
        if operator == "concat":
            return all(field in self.graph.activations for field in _concatenated(self.graph.value[var]))
        if operator == "nn.pad":
            return _pads_with_zero(self.graph.value[var])
        return operator in COMMUTING

    def _averages_positions(self, var: relax.Var) -> bool:
        """Whether it is a pool; ``mean`` is one over the two spatial axes, and part of a normalization otherwise."""
        operator = self._operator(var)
        if operator == "mean":
            value = self.graph.value[var]
            rank = len(value.args[0].ty.shape)
            return rank == 4 and sorted(int(a) % rank for a in value.attrs.axis or ()) == [2, 3]
        return operator in _AVERAGES

    def _unite_scales(self) -> dict[relax.Var, list[relax.Var]]:
        """For each quantized tensor, the tensors whose ranges make its scale.

        An operator that moves values ties its result's scale to its operands'; the values of the result are
        among those of the operands, so only tensors that are nobody's result are watched.
        """
        root = {tensor: tensor for tensor in self.plan.tensors}

        def find(tensor: relax.Var) -> relax.Var:
            while root[tensor] != tensor:
                tensor = root[tensor]
            return tensor

        moved = set()
        for tensor, results in self.tied.items():
            for result in results:
                root[find(result)] = find(tensor)
                moved.add(result)
        watched: dict[relax.Var, list[relax.Var]] = {}
        for tensor in self.plan.tensors:
            if tensor not in moved:
                watched.setdefault(find(tensor), []).append(tensor)
        return {tensor: watched[find(tensor)] for tensor in self.plan.tensors}


def _concatenated(value: relax.Call) -> list[relax.Expr]:
    return list(value.args[0].fields) if isinstance(value.args[0], relax.Tuple) else [value.args[0]]


def _pads_with_zero(value: relax.Call) -> bool:
    return str(value.attrs.pad_mode) == "constant" and float(value.attrs.pad_value) == 0.0


def _is_float(tensor: relax.Var) -> bool:
    return isinstance(tensor.ty, relax.TensorType) and str(tensor.ty.dtype) == "float32"
