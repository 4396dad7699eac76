"""The state of lowering to packed kernels: which values are packed and where, what has been emitted so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from tvm import relax, tirx
from tvm.ir import GlobalVar

from pumice.errors import UnsupportedError
from pumice.passes.choose_kernel import Chooser
from pumice.passes.dataflow import operands, substitute
from pumice.passes.fusion import Graph, Quant
from pumice.passes.numpy_operators import evaluate
from pumice.passes.placement import Plane, is_channels_last, is_pixel, of_batch, plane_of, window_reach
from pumice.passes.rewriting import shape_of
from pumice.record import LayerRecord
from pumice.schedules.geometry import Geometry, Window
from pumice.schedules.layout import Packing, Planes, pack, planes, quantize_packed, unpack
from pumice.targets.isa import Isa
from pumice.targets.target import Target

Work = TypeVar("Work")


@dataclass(frozen=True)
class Packed:
    """A value in packed form: uint8 with ``quant``, or float32 without."""

    expr: relax.Expr
    channels: int
    geometry: Geometry
    quant: Quant | None

    @property
    def dtype(self) -> str:
        """The element type."""
        return "float32" if self.quant is None else "uint8"

    @property
    def depth(self) -> int:
        """Channels in a word."""
        return 1 if self.quant is None else 4

    @property
    def rows(self) -> int:
        """Rows of the tensor."""
        return shape_of(self.expr)[0]


@dataclass
class Builder:
    """Emits bindings and kernels, and knows the packed and the plain form of every value."""

    graph: Graph
    geometries: dict[Plane, Geometry]
    target: Target
    threads: int
    records: dict[str, LayerRecord]
    chooser: Chooser = field(default_factory=Chooser)
    bindings: list[relax.VarBinding] = field(default_factory=list)
    _packed: dict[relax.Var, Packed] = field(default_factory=dict)
    _plain: dict[relax.Var, relax.Expr] = field(default_factory=dict)
    _lazy: dict[relax.Var, relax.Call] = field(default_factory=dict)
    _constants: dict[str, tuple[relax.Var, np.ndarray]] = field(default_factory=dict)
    _kernels: dict[GlobalVar, tirx.PrimFunc] = field(default_factory=dict)
    _by_workload: dict[object, GlobalVar] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)
    _normalizer: relax.BlockBuilder = field(default_factory=relax.BlockBuilder)

    @property
    def isa(self) -> Isa:
        """The instruction set of the target."""
        return self.target.instructions

    def geometry(self, plane: Plane) -> Geometry:
        """Where maps of this size lie."""
        return self.geometries.get(plane, Geometry(*plane))

    # Values

    def define(self, var: relax.Var, packed: Packed) -> None:
        """``var`` is this packed value."""
        self._packed[var] = packed

    def is_known(self, var: relax.Var) -> bool:
        """Whether the value of ``var`` has been made in some form."""
        return var in self._packed or var in self._plain

    def packed(self, var: relax.Expr) -> Packed | None:
        """The packed form of ``var``, if it has one."""
        return self._packed.get(var)

    def packed_float(self, var: relax.Var) -> Packed:
        """The packed float32 form of ``var``, packing it if need be."""
        known = self._packed.get(var)
        if known is not None and known.quant is None:
            return known
        packed = self.pack(var, None)
        if known is None:
            self._packed[var] = packed
        return packed

    def pack(self, var: relax.Var, quant: Quant | None) -> Packed:
        """Pack the plain form of ``var``, quantizing it if ``quant`` is given."""
        plane, channels = plane_of(var)
        # Tokens never have padding: a map one pixel high whose plane looks the same may.
        geometry = Geometry(*plane) if is_channels_last(var) else self.geometry(plane)
        work = self._packing(channels, geometry, is_channels_last(var), quant)
        expr = self.call(work, pack, [self.flat(var)], work.packed_shape, "float32" if quant is None else "uint8")
        return Packed(expr, channels, geometry, quant)

    def quantize(self, value: Packed, quant: Quant) -> Packed:
        """Packed float32 to packed uint8."""
        work = self._packing(value.channels, value.geometry, False, quant)
        expr = self.call(work, quantize_packed, [value.expr], work.packed_shape, "uint8")
        return Packed(expr, value.channels, value.geometry, quant)

    def plain(self, var: relax.Expr) -> relax.Expr:
        """The ordinary tensor that ``var`` stands for; unpacks it once."""
        if not isinstance(var, relax.Var) or var in self.graph.flow.weights or var in self.graph.flow.inputs:
            return var
        if var not in self._plain:
            self._plain[var] = self._fold(var) if var in self._lazy else self._unpack(var, self._packed[var])
        return self._plain[var]

    def _unpack(self, var: relax.Var, value: Packed) -> relax.Expr:
        work = self._packing(value.channels, value.geometry, is_channels_last(var), value.quant)
        flat = self.call(work, unpack, [value.expr], (work.size,), "float32")
        shape = list(shape_of(var))
        expr = self.emit(relax.op.reshape(flat, shape), var.name)
        dtype = str(var.ty.dtype)
        if dtype == "float32" or value.quant is None:
            return expr
        zero_point = value.quant.zero_point - (128 if dtype == "int8" else 0)  # a quantized value, read as it is
        parameters = relax.const(value.quant.scale, "float32"), relax.const(zero_point, dtype)
        return self.emit(relax.op.quantize(expr, *parameters, axis=0, out_dtype=dtype), var.name)

    def _fold(self, var: relax.Var) -> relax.Expr:
        call = self._lazy[var]
        value = evaluate(call, var.ty, [self.graph.array(argument) for argument in call.args])
        if not isinstance(value, np.ndarray):
            raise UnsupportedError(f"{call.args[0].name}: its scale is computed at run time; store it as a constant")
        return self.constant(f"{call.args[0].name}.float", value)

    def flat(self, var: relax.Expr) -> relax.Var:
        """The plain form of ``var`` as one row of elements."""
        plain = self.plain(var)
        size = int(np.prod(shape_of(var)))
        return self.emit(relax.op.reshape(plain, (size,)), "flat")

    def keep(self, var: relax.Var, value: relax.Expr) -> None:
        """Bind ``var`` to its own operator, on plain operands."""
        plain = {operand: self.plain(operand) for operand in dict.fromkeys(operands(value))}
        self._plain[var] = self.emit(substitute(value, plain), var.name)

    def set_plain(self, var: relax.Var, expr: relax.Expr) -> None:
        """``var`` is this ordinary tensor."""
        self._plain[var] = expr

    def target_geometry(self, source: relax.Expr, target: relax.Expr, window: Window) -> Geometry:
        """Where the result of a window over ``source`` lies: the plan's place, or for a single pixel its own."""
        if not is_pixel(target):
            return self.geometry(plane_of(target)[0])
        if is_pixel(source) and window.kernel == (1, 1) and window.padding == (0, 0):
            return Geometry.of_tokens(shape_of(target)[0])
        batch, (pad_h, pad_w) = shape_of(target)[0], window_reach(source, target, window)
        if batch == 1 and pad_h == pad_w == 0 and window.kernel != (1, 1):
            pad_w = 1  # a plane of one position has no room for the vectors of a kernel with several taps
        return Geometry(batch, 1, 1, pad_h, pad_w)

    def move(
        self, value: Packed, target: Geometry, window: Window, fill: float | None = None, always: bool = False
    ) -> Packed:
        """``value`` as stride phases of ``window`` on a plane like ``target``; as it is where that is the same."""
        is_there = value.geometry == target.normalized() and window.stride == (1, 1)
        if is_there and not always:
            return value
        if fill is None:
            fill = 0.0 if value.quant is None else float(value.quant.zero_point)
        batch = max(value.geometry.batch, target.batch)
        places = [of_batch(geometry, batch) for geometry in (value.geometry, target)]
        work = Planes(value.rows, places[0], places[1], window, value.dtype, fill, self.threads)
        shape = (value.rows * len(window.phases()), target.positions, value.depth)
        expr = self.call(work, planes, [value.expr], shape, value.dtype)
        return Packed(expr, value.channels, target, value.quant)

    def repad(self, value: Packed) -> Packed:
        """``value`` with its padding holding the zero point again."""
        return self.move(value, value.geometry, Window((1, 1)), always=True)

    def set_lazy(self, var: relax.Var, value: relax.Call) -> None:
        """``var`` is ``value`` of weights alone: computed at compile time, if anything reads it."""
        self._lazy[var] = value

    # Emission

    def emit(self, value: relax.Expr, name: str) -> relax.Var:
        """Bind ``value`` to a new variable."""
        value = self._normalizer.normalize(value)
        var = relax.DataflowVar(self._unique(name), value.ty)
        self.bindings.append(relax.VarBinding(var, value))
        return var

    def call(
        self,
        work: Work,
        make: Callable[[Work, Isa, str], tirx.PrimFunc],
        arguments: list[relax.Expr],
        shape: tuple[int, ...],
        dtype: str,
        name: str | None = None,
    ) -> relax.Var:
        """Call the kernel ``make(work, isa, name)``; equal workloads share one kernel."""
        return self.call_for(work, make, arguments, [relax.TensorType(list(shape), dtype)], name)[0]

    def call_for(
        self,
        work: Work,
        make: Callable[[Work, Isa, str], tirx.PrimFunc],
        arguments: list[relax.Expr],
        results: list[relax.TensorType],
        name: str | None = None,
    ) -> list[relax.Var]:
        """The same for a kernel that writes several tensors: ``results``, its last arguments."""
        name = name or make.__name__
        key = (make, work)
        if key not in self._by_workload:
            unique = self._unique(name)
            kernel = make(work, self.isa, unique)
            variable = self._normalizer.add_func(kernel, unique)
            self._kernels[variable] = kernel
            self._by_workload[key] = variable
        call = relax.call_tir(self._by_workload[key], relax.Tuple(arguments), results)
        ty = results[0] if len(results) == 1 else relax.TupleType(results)
        var = relax.DataflowVar(self._unique(f"{name}_out"), ty)
        self.bindings.append(relax.VarBinding(var, call))
        if len(results) == 1:
            return [var]
        return [self.emit(relax.TupleGetItem(var, i), f"{name}_out") for i in range(len(results))]

    def call_on_rows(
        self, var: relax.Var, operands: list[relax.Expr], work: Work, make: Callable[[Work, Isa, str], tirx.PrimFunc]
    ) -> None:
        """Compute the plain ``var`` by a kernel that takes plain float32 tensors flat."""
        flat = [self.flat(operand) for operand in operands]
        result = self.call(work, make, flat, (int(np.prod(shape_of(var))),), "float32")
        self.set_plain(var, self.emit(relax.op.reshape(result, shape_of(var)), var.name))

    def constant(self, name: str, value: np.ndarray) -> relax.Var:
        """A weight parameter that holds ``value``; the same name twice is the same parameter."""
        if name not in self._constants:
            own = name
            while self.graph.is_weight(own):  # the model may have a weight called ``conv.multiplier`` of its own
                own += "'"
            var = relax.Var(own, relax.TensorType(list(value.shape), str(value.dtype)))
            self._constants[name] = (var, np.ascontiguousarray(value))
        return self._constants[name][0]

    def mask(self, geometry: Geometry) -> list[relax.Expr]:
        """The mask argument of a kernel that writes to ``geometry``: none if that has no padding."""
        if not geometry.is_padded:
            return []
        name = f"mask {geometry.batch}x{geometry.height}x{geometry.width}+{geometry.pad_h}x{geometry.pad_w}"
        return [self.constant(name, geometry.mask)]

    # The end

    def outputs(self, returned: relax.Expr) -> relax.Expr:
        """What ``main`` returns, as plain variables that may leave the dataflow block."""
        value = self.graph.flow.value.get(returned, returned)
        if isinstance(value, relax.Tuple):
            result: relax.Expr = relax.Tuple([self._leave(item) for item in value.fields])
        else:
            result = self._leave(returned)
        self._drop_unread(result)
        return result

    def _drop_unread(self, result: relax.Expr) -> None:
        read, kept = set(operands(result)), []
        for binding in reversed(self.bindings):
            if binding.var in read:
                read.update(operands(binding.value))
                kept.append(binding)
        self.bindings = kept[::-1]

    def _leave(self, var: relax.Expr) -> relax.Expr:
        expr = self.plain(var)
        out = relax.Var(self._unique("output"), expr.ty)
        self.bindings.append(relax.VarBinding(out, expr))
        return out

    def parameters(self) -> list[relax.Var]:
        """The weight parameters that are read: the source's own that are left, then the kernels'."""
        read = {operand for binding in self.bindings for operand in operands(binding.value)}
        own = [var for var in self.graph.flow.weights if var in read]
        made = [var for var, _ in self._constants.values() if var in read]
        return [*sorted(own, key=lambda var: var.name), *made]

    def weights(self, source: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The values of ``parameters()``."""
        made = {var.name: value for var, value in self._constants.values()}
        return {var.name: made[var.name] if var.name in made else source[var.name] for var in self.parameters()}

    def kernels(self) -> list[tuple[GlobalVar, tirx.PrimFunc]]:
        """The kernels that are called."""
        called = {v for b in self.bindings if isinstance(b.value, relax.Call) for v in b.value.args[:1]}
        return [(variable, kernel) for variable, kernel in self._kernels.items() if variable in called]

    def _packing(self, channels: int, geometry: Geometry, tokens: bool, quant: Quant | None) -> Packing:
        scale, zero_point = (None, 0) if quant is None else (quant.scale, quant.zero_point)
        return Packing(channels, geometry, tokens, scale, zero_point, self.threads)

    def _unique(self, name: str) -> str:
        clean = "".join(c if c.isalnum() or c == "_" else "_" for c in name)[:80]
        unique, number = clean, 1
        while unique in self._names or unique == "main":
            unique, number = f"{clean}_{number}", number + 1
        self._names.add(unique)
        return unique
