"""Which tokens are padding: nobody reads what a network makes of it, so it must not decide about anything."""

from __future__ import annotations

import numpy as np
from tvm.ir import IRModule

from pumice.module import inputs_of
from pumice.passes.rewriting import shape_of


def token_mask(mod: IRModule) -> str | None:
    """The input that says which tokens are real: of integers or booleans, ``[batch, tokens]``, with "mask" in its name.

    That is what exporters of transformers call it (``attention_mask``); None where there is no such input.
    """
    for var in inputs_of(mod):
        if "mask" in var.name.lower() and len(shape_of(var)) == 2 and str(var.ty.dtype) in ("int64", "int32", "bool"):
            return str(var.name)
    return None


def real_positions(value: np.ndarray, real: np.ndarray | None) -> np.ndarray:
    """``value [batch, tokens, ..., C]`` as ``[positions, C]`` without padding; other shapes lose nothing.

    ``real`` is what ``token_mask`` names, bool ``[batch, tokens]``. A sample of nothing but padding stays whole.
    """
    if real is not None and value.ndim >= 3 and value.shape[:2] == real.shape and real.any():
        value = value[real]
    return value.reshape(-1, value.shape[-1])
