"""A compiler pass that multiplies pruning masks into the weights that they mask."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.errors import ModelError
from pumice.module import mask_sources_of, source_of, with_mask_sources
from pumice.passes.rewriting import Rewriter, op_name, rewrite, shape_of

_WEIGHT_SUFFIX = "_orig"  # what torch.nn.utils.prune appends to a pruned parameter's name
_MASK_SUFFIX = "_mask"


@tvm.transform.module_pass(opt_level=0, name="pumice.FoldMasks")
class FoldMasks:
    """``multiply(w, mask) -> w`` with the zeros in it, for two weights of which one is all 0 and 1.

    The weight keeps its source name (``conv.weight`` for ``conv.weight_orig`` with ``conv.weight_mask``), the
    mask's parameter goes, and ``mask_sources_of(mod)`` tells where the zeros come from. Raises ModelError for
    a parameter named as a mask that is not all 0 and 1, or whose shape does not fit the weight.
    """

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Fold every mask."""
        sources = mask_sources_of(mod)
        folded = rewrite(mod, lambda rw, var, value: _fold_mask(rw, value, sources))
        return with_mask_sources(folded, sources) if sources else folded


def _fold_mask(rw: Rewriter, value: relax.Expr, sources: dict[str, str]) -> relax.Expr | None:
    if op_name(value) != "relax.multiply":
        return None
    found = _weight_and_mask(rw, _without_cast(rw, value.args[0]), _without_cast(rw, value.args[1]))
    if found is None:
        return None
    weight_var, mask_var = found
    weight, mask = rw.array(weight_var), rw.array(mask_var)
    if weight is None or mask is None:
        return None
    if np.broadcast_shapes(weight.shape, mask.shape) != weight.shape:
        raise ModelError(
            f"{source_of(rw.mod)}: the mask {mask_var.name} has shape {mask.shape}, which does not fit the weight "
            f"{weight_var.name} of shape {weight.shape}; give a mask of the weight's shape"
        )
    name = weight_var.name.removesuffix(_WEIGHT_SUFFIX)
    by_torch = weight_var.name.endswith(_WEIGHT_SUFFIX) and mask_var.name == name + _MASK_SUFFIX
    sources.setdefault(name, "torch.nn.utils.prune" if by_torch else f"mask in the model ({mask_var.name})")
    # Not a product: a masked weight that is infinite or NaN is a zero, not a NaN.
    return rw.weight(name, np.where(mask.astype(bool), weight, np.zeros((), weight.dtype)))


def _without_cast(rw: Rewriter, expr: relax.Expr) -> relax.Expr:
    """The parameter behind a cast: masks are often stored as booleans or bytes."""
    cast = rw.call(expr, "astype")
    return expr if cast is None else cast.args[0]


def _weight_and_mask(rw: Rewriter, a: relax.Expr, b: relax.Expr) -> tuple[relax.Var, relax.Var] | None:
    if not (rw.is_weight(a) and rw.is_weight(b)):
        return None
    for weight, mask in ((a, b), (b, a)):
        if mask.name.endswith(_MASK_SUFFIX):
            if not _is_mask(rw.array(mask)):
                raise ModelError(
                    f"{source_of(rw.mod)}: the mask {mask.name} has values other than 0 and 1; a mask keeps a "
                    "weight (1) or removes it (0)"
                )
            return weight, mask
    # Without a telling name only a matrix of the weight's shape counts: a vector of zeros and ones may be a scale.
    for weight, mask in ((a, b), (b, a)):
        same_shape = shape_of(weight) == shape_of(mask) and len(shape_of(mask)) > 1
        if same_shape and _is_mask(rw.array(mask)):
            return weight, mask
    return None


def _is_mask(array: np.ndarray | None) -> bool:
    return array is not None and bool(np.isin(array, (0, 1)).all())
