"""From a lowered module to the plan that a library runs: kernel calls in order, on places in memory.

    x_p = call_tir(pack, x)                              pack(input 0, workspace + 0)
    y = call_tir(layer_conv1, x_p, conv1.blocks, ...)    layer_conv1(workspace + 0, weights + 0, ..., workspace + 25088)
    z = reshape(y)                                 ->
    return call_tir(unpack, z)                           unpack(workspace + 25088, output 0)

A reshape is another name for the same bytes. What the model returns is written straight into the caller's output;
only what is returned twice, or was an input or a weight, is copied there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import tvm_ffi
from tvm import relax, tirx
from tvm.ir import GenericConst, GlobalVar, IRModule, Type
from tvm.runtime import DataType

from pumice.errors import UnsupportedError
from pumice.module import inputs_of, layers_of, source_of, weight_vars_of, weights_of
from pumice.passes.plan_memory import Lifetime, plan_memory
from pumice.passes.rewriting import bindings_of, op_name
from pumice.schedules.copy import copy
from pumice.targets.plan import FIRST_INPUT, WEIGHTS, WORKSPACE, Plan, Spec, Step, View, align, aligned


def link_steps(mod: IRModule) -> Plan:
    """The plan of a lowered module with its weights.

    Raises UnsupportedError for a value that is no kernel call, reshape or tuple.
    """
    return _Linker(mod).plan()


@dataclass(eq=False)
class _Storage:
    """Bytes that one or more variables name; those without a place yet go to the workspace."""

    size: int
    place: View | None = None


_Value = _Storage | tuple[_Storage, ...]


@dataclass(frozen=True)
class _Call:
    kernel: str
    arguments: tuple[_Storage, ...]
    results: tuple[_Storage, ...]
    layer: str


class _Linker:
    def __init__(self, mod: IRModule) -> None:
        self._mod = mod
        self._kernels = {name.name_hint: f for name, f in mod.functions_items() if name.name_hint != "main"}
        self._weights = _Weights()
        self._calls: list[_Call] = []
        self._values: dict[relax.Expr, _Value] = {}
        self._inputs = [_spec(var.ty) for var in inputs_of(mod)]
        self._layer_of: dict[relax.Var, str] = {}
        self._bind_parameters()

    def plan(self) -> Plan:
        for var, value in bindings_of(self._mod):
            self._values[var] = self._bind(value)
        main = self._mod["main"]
        self._deliver(self._storages([main.body.body]))
        workspace = self._place()
        steps = tuple(_step(call) for call in self._calls)
        kernels = {step.kernel: _from_first_elements(self._kernels[step.kernel]) for step in steps}
        outputs = tuple(_spec(ty) for ty in (main.ret_ty.fields if _is_tuple(main.ret_ty) else [main.ret_ty]))
        return Plan(kernels, steps, self._weights.blob(), workspace, tuple(self._inputs), outputs)

    def _bind_parameters(self) -> None:
        for i, var in enumerate(inputs_of(self._mod)):
            self._values[var] = _Storage(_bytes(var.ty), View(FIRST_INPUT + i))
        weights = weights_of(self._mod)
        for var in weight_vars_of(self._mod):
            self._values[var] = self._weights.add(weights[var.name])
        variables = {var.name: var for var in weight_vars_of(self._mod)}
        for layer in layers_of(self._mod).values():  # a layer's kernel reads its blocks, an operator the weight itself
            for name in (layer.weight, f"{layer.name}.blocks"):
                if name in variables:
                    self._layer_of[variables[name]] = layer.name

    def _bind(self, value: relax.Expr) -> _Value:
        if op_name(value) == "relax.call_tir":
            return self._call(value)
        if op_name(value) == "relax.reshape":
            return self._storages(value.args[:1])[0]
        if isinstance(value, relax.TupleGetItem):
            return self._storages([value.tuple_value])[int(value.index)]
        storages = self._storages([value])
        return storages if _is_tuple(value.ty) else storages[0]

    def _call(self, call: relax.Call) -> _Value:
        name, arguments = call.args[0], call.args[1]
        assert isinstance(name, GlobalVar)
        (ty,) = call.ty_args
        fields = ty.fields if _is_tuple(ty) else [ty]
        results = tuple(_Storage(_bytes(field)) for field in fields)
        given = arguments.fields if isinstance(arguments, relax.Tuple) else [arguments]
        layer = next((self._layer_of[var] for var in given if var in self._layer_of), "")
        self._calls.append(_Call(name.name_hint, self._storages([arguments]), results, layer))
        return results if _is_tuple(ty) else results[0]

    def _storages(self, values: Iterable[relax.Expr]) -> tuple[_Storage, ...]:
        """The storages that expressions name, tuples laid flat."""
        found: list[_Storage] = []
        for value in values:
            if isinstance(value, relax.Var):
                known = self._values[value]
                found += known if isinstance(known, tuple) else [known]
            elif isinstance(value, relax.Tuple):
                found += self._storages(value.fields)
            elif isinstance(value, GenericConst):
                found.append(self._weights.add(value.value.numpy()))
            else:
                what = op_name(value).removeprefix("relax.") or type(value).__name__
                raise UnsupportedError(
                    f"{source_of(self._mod)}: operator '{what}' is left after lowering, and no kernel computes it; "
                    "take it out of the model, or compute it outside"
                )
        return tuple(found)

    def _deliver(self, returned: tuple[_Storage, ...]) -> None:
        """Give each output its place, by a copy where its bytes lie elsewhere already."""
        for i, storage in enumerate(returned):
            place = View(FIRST_INPUT + len(self._inputs) + i)
            if storage.place is None:
                storage.place = place
            else:
                name = f"copy_{storage.size}_bytes"
                self._kernels[name] = copy(storage.size, name)
                self._calls.append(_Call(name, (storage,), (_Storage(storage.size, place),), ""))

    def _place(self) -> int:
        """Give what is left a place in the workspace; its size."""
        used: dict[_Storage, list[int]] = {}
        for i, call in enumerate(self._calls):
            for storage in (*call.arguments, *call.results):
                if storage.place is None:
                    used.setdefault(storage, []).append(i)
        placement = plan_memory([Lifetime(storage.size, steps[0], steps[-1]) for storage, steps in used.items()])
        for storage, offset in zip(used, placement.offsets, strict=True):
            storage.place = View(WORKSPACE, offset)
        return placement.size


class _Weights:
    """All weights as one piece, equal ones once."""

    def __init__(self) -> None:
        self._known: dict[bytes, _Storage] = {}
        self._arrays: list[tuple[int, np.ndarray]] = []
        self._size = 0

    def add(self, array: np.ndarray) -> _Storage:
        """Where the bytes of ``array`` lie."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        digest = hashlib.sha256(data.data).digest()
        if digest not in self._known:
            self._known[digest] = _Storage(data.size, View(WEIGHTS, self._size))
            self._arrays.append((self._size, data))
            self._size += align(data.size)
        return self._known[digest]

    def blob(self) -> np.ndarray:
        """uint8, zeros between the arrays."""
        blob = aligned((self._size,), "uint8")
        blob[:] = 0
        for offset, data in self._arrays:
            blob[offset : offset + data.size] = data
        return blob


def _step(call: _Call) -> Step:
    places = [storage.place for storage in (*call.arguments, *call.results)]
    outputs = tuple(storage.size for storage in call.results)
    return Step(call.kernel, tuple(place for place in places if place is not None), call.layer, outputs)


def _from_first_elements(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
    """``kernel`` without the offsets that TVM leaves open in some arguments: a view starts at its first element."""
    offsets = {buffer.elem_offset for buffer in kernel.params if isinstance(buffer.elem_offset, tirx.Var)}
    return tvm_ffi.structural_map(kernel, (tirx.Var, lambda var: tirx.const(0, var.ty) if var in offsets else var))


def _is_tuple(ty: Type) -> bool:
    return isinstance(ty, relax.TupleType)


def _spec(ty: relax.TensorType) -> Spec:
    return tuple(int(size) for size in ty.shape), str(ty.dtype)


def _bytes(ty: relax.TensorType) -> int:
    shape, name = _spec(ty)
    dtype = DataType(name)
    return math.prod(shape) * -(-int(dtype.bits) * int(dtype.lanes) // 8)
