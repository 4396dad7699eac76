"""Read a model of any kind: the one entry that the compile driver calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from tvm.ir import IRModule

from pumice.errors import UsageError
from pumice.frontend.onnx_model import read_onnx

_EXAMPLE = "give an .onnx or .pt2 file, an onnx.ModelProto, or a torch.nn.Module with example inputs"


def read_model(source: Any, inputs: Any = None) -> IRModule:
    """A model file or a live model as a module in Pumice's form.

    ``source`` is the path of an ``.onnx`` or ``.pt2`` file, an ``onnx.ModelProto``, or a ``torch.nn.Module``.
    ``inputs`` pins open shapes (name -> extents); for a live torch module it is the tuple of example inputs.
    Raises UsageError for any other source, and what the frontends raise.
    """
    if isinstance(source, onnx.ModelProto):
        return read_onnx(source, inputs)
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix == ".pt2":
            from pumice.frontend.torch_model import read_pt2  # torch is needed only here

            return read_pt2(path, inputs)
        if path.suffix == ".onnx" or not path.suffix or not path.is_file():
            return read_onnx(path, inputs)
        raise UsageError(f"The model {path.name} is of a kind that is not known here; {_EXAMPLE}.")
    if hasattr(source, "state_dict") and callable(source):
        from pumice.frontend.torch_model import read_torch

        return read_torch(source, inputs)
    raise UsageError(f"A {type(source).__name__} is not a model; {_EXAMPLE}.")
