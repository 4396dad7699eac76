"""Pumice: compiles trained networks into small, sparse int8 libraries.

    artifact = pumice.compile("model.onnx", calibration={"image": images})
    artifact.save("model.so")
    outputs = pumice.load("model.so")(image=image)

Nothing heavy is imported before it is used: running a library needs no onnx, and ``pumice -h`` no TVM.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pumice.errors import PumiceError

if TYPE_CHECKING:
    from pumice.artifact import CompiledModel, load
    from pumice.driver import compile_model as compile

__all__ = ["CompiledModel", "PumiceError", "compile", "load"]

_LAZY = {
    "CompiledModel": ("pumice.artifact", "CompiledModel"),
    "load": ("pumice.artifact", "load"),
    "compile": ("pumice.driver", "compile_model"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pumice' has no attribute '{name}'")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)
