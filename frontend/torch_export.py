"""A trained network out: a file with its zeros in place and plain names, for ``pumice compile``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice.errors import UsageError
from pumice.frontend.torch_int8 import remove_fake_quantization
from pumice.frontend.torch_masks import materialise_masks
from pumice.frontend.torch_model import frozen_copy


def export(
    model: nn.Module,
    example: tuple[Tensor, ...],
    path: str | Path,
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    dynamic_shapes: Any = None,
) -> Path:
    """Write ``model``, in evaluation mode, to ``path``, as ``.onnx`` or ``.pt2``; it stays as it was.

    Fake quantization is taken out, masks of ``torch.nn.utils.prune`` and parametrizations become zeros, and weights
    carry the names of the plain model's state dict. ``example`` are inputs in the order of ``forward``; their shapes
    are fixed but for ``dynamic_shapes``, which is as in ``torch.export.export``. Names are for ONNX only; by default
    inputs are named as the arguments of ``forward``. Raises UsageError for a path that ends otherwise.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise UsageError(f"{path.name}: a network is exported to a file that ends in .onnx or .pt2")
    source = type(model).__name__
    plain = frozen_copy(model, source)
    remove_fake_quantization(plain)
    materialise_masks(plain, source)
    if path.suffix == ".pt2":
        torch.export.save(torch.export.export(plain, example, dynamic_shapes=dynamic_shapes), path)
        return path
    torch.onnx.export(
        plain,
        example,
        path,
        input_names=list(input_names) or None,
        output_names=list(output_names) or None,
        dynamic_shapes=dynamic_shapes,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    return path
