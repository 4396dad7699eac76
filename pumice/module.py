"""The form in which a model flows through every stage: one Relax module that carries its weights and records.

``main(inputs..., weights...)`` has the attribute ``num_input``: how many leading parameters are inputs. A
weight's parameter is named as in the source file (``layer1.0.conv1.weight``), and its value lies in the module
attribute ``pumice.weights``. What stages decided about each layer lies in ``pumice.layers``. So a module can be
printed, saved, or handed to any Relax pass, and nothing about it is kept elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import tvm
import tvm_ffi
from tvm import relax
from tvm.ir import IRModule

from pumice.errors import PumiceError
from pumice.record import LayerRecord

# TVM calls passes from C++, which hands an exception on as what it is only if its type is registered.
_errors: list[type[PumiceError]] = [PumiceError, *PumiceError.__subclasses__()]
for _error in _errors:
    tvm_ffi.register_error(_error)

_WEIGHTS = "pumice.weights"
_LAYERS = "pumice.layers"
_OUTPUTS = "pumice.outputs"
_SOURCE = "pumice.source"
_MASKS = "pumice.masks"


def inputs_of(mod: IRModule) -> list[relax.Var]:
    """The parameters of ``main`` that the user feeds, in order."""
    main = mod["main"]
    return list(main.params[: _num_input(main)])


def weight_vars_of(mod: IRModule) -> list[relax.Var]:
    """The parameters of ``main`` that hold weights, in order."""
    main = mod["main"]
    return list(main.params[_num_input(main) :])


def weights_of(mod: IRModule) -> dict[str, np.ndarray]:
    """The weights by name, as read-only views (no copy)."""
    stored = mod.attrs[_WEIGHTS] if mod.attrs and _WEIGHTS in mod.attrs else {}
    views = {}
    for name, tensor in stored.items():
        view = np.from_dlpack(tensor)
        view.flags.writeable = False
        views[str(name)] = view
    return views


def with_weights(mod: IRModule, weights: Mapping[str, np.ndarray | tvm.runtime.Tensor]) -> IRModule:
    """``mod`` with exactly these weights; arrays that came from ``weights_of`` unchanged are not copied."""
    stored = mod.attrs[_WEIGHTS] if mod.attrs and _WEIGHTS in mod.attrs else {}
    kept = {}
    for name, value in weights.items():
        old = stored.get(name)
        unchanged = (
            old is not None
            and isinstance(value, np.ndarray)
            and value.ctypes.data == np.from_dlpack(old).ctypes.data
            and value.shape == tuple(old.shape)
            and value.strides == np.from_dlpack(old).strides
            and str(value.dtype) == str(old.dtype)
        )
        kept[name] = old if unchanged else tvm.runtime.tensor(np.ascontiguousarray(value).reshape(value.shape))
    return mod.with_attr(_WEIGHTS, kept)


def layers_of(mod: IRModule) -> dict[str, LayerRecord]:
    """The per-layer records made so far, by layer name, in execution order."""
    if not (mod.attrs and _LAYERS in mod.attrs):
        return {}
    return {entry["name"]: LayerRecord.from_json(entry) for entry in json.loads(str(mod.attrs[_LAYERS]))}


def with_layers(mod: IRModule, layers: Mapping[str, LayerRecord]) -> IRModule:
    """``mod`` with these per-layer records."""
    return mod.with_attr(_LAYERS, json.dumps([layer.to_json() for layer in layers.values()]))


def output_names_of(mod: IRModule) -> list[str]:
    """The outputs' names as in the source, in order; a module from elsewhere has ``output``, ``output_1``, ..."""
    if mod.attrs and _OUTPUTS in mod.attrs:
        return [str(name) for name in mod.attrs[_OUTPUTS]]
    result = mod["main"].ret_ty
    count = len(result.fields) if isinstance(result, relax.TupleType) else 1
    return ["output" if i == 0 else f"output_{i}" for i in range(count)]


def with_output_names(mod: IRModule, names: list[str]) -> IRModule:
    """``mod`` with its outputs named."""
    return mod.with_attr(_OUTPUTS, list(names))


def source_of(mod: IRModule) -> str:
    """What messages call the model: its file's name, or the class of the live module."""
    return str(mod.attrs[_SOURCE]) if mod.attrs and _SOURCE in mod.attrs else "the model"


def with_source(mod: IRModule, source: str) -> IRModule:
    """``mod`` with the name that messages call it by."""
    return mod.with_attr(_SOURCE, source)


def mask_sources_of(mod: IRModule) -> dict[str, str]:
    """Where each masked weight's mask came from, by weight name: ``torch.nn.utils.prune``, ``side file masks.npz``."""
    return dict(json.loads(str(mod.attrs[_MASKS]))) if mod.attrs and _MASKS in mod.attrs else {}


def with_mask_sources(mod: IRModule, sources: Mapping[str, str]) -> IRModule:
    """``mod`` with exactly these mask sources."""
    return mod.with_attr(_MASKS, json.dumps(dict(sources)))


def _num_input(main: relax.Function) -> int:
    if main.attrs and "num_input" in main.attrs:
        return int(main.attrs["num_input"])
    return len(main.params)
