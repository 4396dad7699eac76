"""Modules to lower, written operator by operator, with the integers that the definition expects of each value.

``Net`` builds a module form. ``QuantizedNet`` does so in the quantized form and computes, beside every value, its
stored integers with ``reference.py``: one line of a test makes the graph and says what must come out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import reference
import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.module import inputs_of, weight_vars_of, weights_of, with_output_names, with_source, with_weights
from pumice.passes.link_steps import link_steps
from pumice.passes.pipeline import LowerOptions, lower
from pumice.targets.executor import build_executor
from pumice.targets.target import Target


def _quick(target: Target) -> Target:
    """Compiled with less effort: the graphs are run once. Kernels have tests of their own with all of it."""
    config = {"kind": "llvm", **{str(key): value for key, value in target.tvm.attrs.items()}, "opt-level": 1}
    return replace(target, tvm=tvm.target.Target(config))


NATIVE = _quick(Target.parse("native"))


class Net:
    """A module form under construction."""

    def __init__(self, dtype: str = "float32", **inputs: tuple[int, ...]) -> None:
        self.inputs = {name: relax.Var(name, relax.TensorType(shape, dtype)) for name, shape in inputs.items()}
        self.parameters: dict[str, tuple[relax.Var, np.ndarray]] = {}
        self.bindings: list[relax.VarBinding] = []
        self.normalizer = relax.BlockBuilder()
        self.rng = np.random.default_rng(5)

    def emit(self, value: relax.Expr) -> relax.Var:
        """Bind ``value``."""
        value = self.normalizer.normalize(value)
        var = relax.DataflowVar(f"v{len(self.bindings)}", value.ty)
        self.bindings.append(relax.VarBinding(var, value))
        return var

    def parameter(self, name: str, value: np.ndarray) -> relax.Var:
        """A weight; the same name twice is the same weight."""
        if name not in self.parameters:
            var = relax.Var(name, relax.TensorType(value.shape, str(value.dtype)))
            self.parameters[name] = (var, value)
        return self.parameters[name][0]

    def floats(self, name: str, *shape: int, scale: float = 1.0) -> relax.Var:
        """A random float weight."""
        return self.parameter(name, (self.rng.standard_normal(shape) * scale).astype(np.float32))

    def conv(self, x: relax.Var, name: str, n: int, kernel: int = 3, bias: bool = True, **attrs: Any) -> relax.Var:
        """A float convolution with its bias."""
        channels = int(x.ty.shape[1]) // int(attrs.get("groups", 1))
        weight = self.floats(f"{name}.weight", n, channels, kernel, kernel, scale=0.3)
        y = self.emit(relax.op.nn.conv2d(x, weight, **attrs))
        return self.emit(relax.op.add(y, self.floats(f"{name}.bias", 1, n, 1, 1))) if bias else y

    def linear(self, x: relax.Var, name: str, n: int) -> relax.Var:
        """A float matrix product with its bias."""
        weight = self.floats(f"{name}.weight", int(x.ty.shape[-1]), n, scale=0.3)
        y = self.emit(relax.op.matmul(x, weight))
        return self.emit(relax.op.add(y, self.floats(f"{name}.bias", n)))

    def module(self, *outputs: relax.Var) -> IRModule:
        """The module that returns ``outputs``."""
        variables = [relax.Var(f"out{i}", output.ty) for i, output in enumerate(outputs)]
        bindings = [*self.bindings, *(relax.VarBinding(v, o) for v, o in zip(variables, outputs, strict=True))]
        body = variables[0] if len(variables) == 1 else relax.Tuple(variables)
        params = [*self.inputs.values(), *(var for var, _ in self.parameters.values())]
        sequence = relax.SeqExpr([relax.DataflowBlock(bindings)], body)
        ret = variables[0].ty if len(variables) == 1 else relax.TupleType([v.ty for v in variables])
        function = relax.Function(params, sequence, ret, True).with_attr("num_input", len(self.inputs))
        function = function.with_attr("global_symbol", "main")
        mod = IRModule({"main": self.normalizer.normalize(function)})
        mod = with_weights(mod, {name: value for name, (_, value) in self.parameters.items()})
        mod = with_output_names(with_source(mod, "net"), [f"y{i}" for i in range(len(outputs))])
        relax.analysis.well_formed(mod)
        return mod

    def feeds(self) -> dict[str, np.ndarray]:
        """Random inputs."""
        made = {}
        for name, var in self.inputs.items():
            shape = [int(d) for d in var.ty.shape]
            made[name] = np.random.default_rng(6).standard_normal(shape).astype(np.float32)
        return made


@dataclass(frozen=True)
class Value:
    """A dequantized variable of the graph, and its stored integers (unsigned) by the definition."""

    var: relax.Var
    q: np.ndarray
    scale: float
    zero_point: int
    signed: bool = False

    @property
    def real(self) -> np.ndarray:
        """What it stands for."""
        return reference.dequantize(self.q, self.scale, self.zero_point)


class QuantizedNet(Net):
    """A module in the quantized form; ``feed`` is what its one input ``x`` gets."""

    def __init__(self, *shape: int, seed: int = 6) -> None:
        super().__init__(x=shape)
        self.feed = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)

    def feeds(self) -> dict[str, np.ndarray]:
        """The input."""
        return {"x": self.feed}

    def start(self, scale: float = 0.03, zero_point: int = 100, signed: bool = False) -> Value:
        """The quantized input."""
        q = reference.quantize_u8(self.feed, scale, zero_point)
        return self.rounded(self.inputs["x"], q, scale, zero_point, signed)

    def quantize(self, var: relax.Var, scale: float, zero_point: int, signed: bool = False) -> relax.Var:
        """The quantize alone; ``zero_point`` counts in unsigned bytes."""
        dtype = "int8" if signed else "uint8"
        parameters = self.number(scale), relax.const(zero_point - 128 * signed, dtype)
        return self.emit(relax.op.quantize(var, *parameters, axis=0, out_dtype=dtype))

    def dequantize(self, var: relax.Var, scale: float, zero_point: int) -> relax.Var:
        """The dequantize alone."""
        dtype = str(var.ty.dtype)
        parameters = self.number(scale), relax.const(zero_point - 128 * (dtype == "int8"), dtype)
        return self.emit(relax.op.dequantize(var, *parameters, axis=0, out_dtype="float32"))

    def rounded(self, var: relax.Var, q: np.ndarray, scale: float, zero_point: int, signed: bool = False) -> Value:
        """quantize -> dequantize of ``var``, whose integers are ``q``."""
        stored = self.quantize(var, scale, zero_point, signed)
        return Value(self.dequantize(stored, scale, zero_point), q, float(np.float32(scale)), zero_point, signed)

    @staticmethod
    def number(value: float) -> relax.Expr:
        """A float32 scalar."""
        return relax.const(np.float32(value), "float32")

    def weight(
        self, name: str, shape: tuple[int, ...], axis: int, density: float
    ) -> tuple[relax.Var, np.ndarray, np.ndarray]:
        """A quantized weight: its dequantized variable, its integers and its scales. Zeros come in 1x4 blocks."""
        if f"{name}.weight" not in self.parameters:
            inputs = 1 - axis
            keep = self.rng.random([-(-d // 4) if i == inputs else d for i, d in enumerate(shape)]) < density
            keep = np.repeat(keep, 4, axis=inputs).take(range(shape[inputs]), axis=inputs)
            self.parameter(f"{name}.weight", (self.rng.integers(-127, 128, shape) * keep).astype(np.int8))
            scales = (self.rng.random(shape[axis]) * 0.01 + 0.001).astype(np.float32)
            self.parameter(f"{name}.weight.scale", scales)
        weight, scale = self.parameters[f"{name}.weight"], self.parameters[f"{name}.weight.scale"]
        zeros = relax.const(np.zeros(shape[axis], np.int8), "int8")
        var = self.emit(relax.op.dequantize(weight[0], scale[0], zeros, axis=axis, out_dtype="float32"))
        return var, weight[1], scale[1]

    def conv_layer(
        self,
        x: Value,
        name: str,
        n: int,
        kernel: int = 3,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        density: float = 1.0,
        **rest: Any,
    ) -> Value:
        """conv2d, bias, activation, quantize; ``rest`` as in ``_finish``."""
        shape = (n, x.q.shape[1] // groups, kernel, kernel)
        weight, wq, sw = self.weight(name, shape, 0, density)
        attrs = {"strides": stride, "padding": padding, "dilation": dilation, "groups": groups}
        y = self.emit(relax.op.nn.conv2d(x.var, weight, **attrs))
        bias = self.bias(name, n)
        y = self.emit(relax.op.add(y, self.parameter(f"{name}.bias", bias.reshape(1, n, 1, 1))))
        bias_q = reference.quantize_bias(bias, x.scale, sw)
        acc = reference.conv_accumulate(x.q, x.zero_point, wq, bias_q, stride, padding, dilation, groups)
        return self._finish(y, acc, x, sw.reshape(1, n, 1, 1), **rest)

    def linear_layer(self, x: Value, name: str, n: int, *, density: float = 1.0, **rest: Any) -> Value:
        """matmul, bias, activation, quantize."""
        weight, wq, sw = self.weight(name, (x.q.shape[-1], n), 1, density)
        y = self.emit(relax.op.matmul(x.var, weight))
        bias = self.bias(name, n)
        y = self.emit(relax.op.add(y, self.parameter(f"{name}.bias", bias)))
        acc = reference.linear_accumulate(x.q, x.zero_point, wq, reference.quantize_bias(bias, x.scale, sw))
        return self._finish(y, acc, x, sw, **rest)

    def bias(self, name: str, n: int) -> np.ndarray:
        """A bias; the one that is there if the name is known."""
        if f"{name}.bias" not in self.parameters:
            return (self.rng.standard_normal(n) * 0.5).astype(np.float32)
        return self.parameters[f"{name}.bias"][1].reshape(n)

    def _finish(
        self,
        y: relax.Var,
        acc: np.ndarray,
        x: Value,
        sw: np.ndarray,
        *,
        residual: Value | None = None,
        rounds_before_add: bool = False,
        clip: tuple[float, float] | None = None,
        relu: bool = False,
        signed: bool = False,
    ) -> Value:
        real = acc * np.float64(x.scale) * sw.astype(np.float64)
        if rounds_before_add:  # the quantized form has a quantize here; the lowering skips it
            y = self.rounded(y, acc, float(np.abs(real).max() / 120), 128).var
        if residual is not None:
            y = self.emit(relax.op.add(y, residual.var))
            real = real + residual.real
        if relu:
            y, real = self.emit(relax.op.nn.relu(y)), np.maximum(real, 0)
        if clip is not None:
            y, real = self.emit(relax.op.clip(y, *clip)), np.clip(real, *clip)
        scale, zero_point = parameters_for(real)
        store = reference.quantize_u8
        lo, hi = 0, 255
        if relu:
            lo = zero_point
        if clip is not None:
            lo, hi = (int(store(np.float32(bound), scale, zero_point)) for bound in clip)
        other = None
        if residual is not None:
            ratio = float(np.float32(residual.scale / scale))
            other = reference.Residual(residual.q, residual.zero_point, ratio)
        m = reference.multiplier(x.scale, sw, scale)
        return self.rounded(y, reference.requantize(acc, m, zero_point, other, lo, hi), scale, zero_point, signed)


def parameters_for(real: np.ndarray) -> tuple[float, int]:
    """A scale and zero point for these values; the largest few saturate."""
    low, high = min(0.0, float(real.min()) * 0.9), max(0.0, float(real.max()) * 0.9)
    scale = float(np.float32(max(high - low, 1e-3) / 255))
    return scale, int(np.clip(np.rint(-low / scale), 0, 255))


def run_lowered(
    mod: IRModule, feeds: Mapping[str, np.ndarray], target: Target = NATIVE, **options: Any
) -> tuple[list[np.ndarray], IRModule]:
    """The outputs of ``mod``, lowered and built for this machine, and the lowered module."""
    lowered = lower(mod, target, LowerOptions(**options))
    relax.analysis.well_formed(lowered)
    weights = weights_of(lowered)
    assert [var.name for var in weight_vars_of(lowered)] == list(weights)
    executor = build_executor(link_steps(lowered), target)
    for var, buffer in zip(inputs_of(lowered), executor.inputs, strict=True):
        buffer[...] = feeds[var.name]
    executor.run()
    return executor.outputs, lowered


def run_net(net: Net, *outputs: relax.Var, **options: Any) -> tuple[list[np.ndarray], IRModule]:
    """``run_lowered`` of the net on its own inputs."""
    return run_lowered(net.module(*outputs), net.feeds(), **options)


def kernels_called(lowered: IRModule) -> list[str]:
    """The kernels and operators of ``main`` in order; kernels by name without their number."""
    names = []
    for block in lowered["main"].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Call):
                is_kernel = str(value.op.name) == "relax.call_tir"
                names.append(value.args[0].name_hint if is_kernel else str(value.op.name).removeprefix("relax."))
    return names
