"""The ATen operators that Pumice imports: those whose numbers its tests compare with torch's own.

TVM's importer knows more of them and trusts each node; here an operator that no test covers is refused by name, a
keyword that its converter would ignore is refused too, and what a converter emits must have the shape and the data
type that torch recorded for that node. Converters whose numbers are wrong are replaced by those of
``torch_converters``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from tvm import relax
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from pumice.errors import UnsupportedError
from pumice.frontend.torch_converters import REPLACED

Converter = Callable[[fx.Node], Any]

# Left whole when a program is decomposed: Relax has the operator itself (one node where the decomposition has
# many), or, for attention, the decomposition guards rows that no mask has hidden.
KEPT_WHOLE = (
    torch.ops.aten.linear.default,
    torch.ops.aten.matmul.default,
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten.silu.default,
)

# What says only where or how a tensor lies in memory.
_MEMORY_KEYWORDS = frozenset({"memory_format", "layout", "device", "pin_memory", "non_blocking"})

_TESTED = " ".join(
    (
        "_adaptive_avg_pool2d.default _adaptive_avg_pool3d.default _log_softmax.default",
        "_native_batch_norm_legit.no_stats _native_batch_norm_legit_no_training.default _softmax.default",
        "_to_copy.default abs.default acos.default acosh.default add.Scalar add.Tensor addmm.default alias.default",
        "amax.default amin.default any.default any.dim any.dims argmax.default argmin.default asin.default",
        "asinh.default",
        "atan.default atan2.default atanh.default avg_pool1d.default avg_pool2d.default avg_pool3d.default",
        "bitwise_and.Scalar bitwise_and.Tensor bitwise_not.default bitwise_or.Tensor bmm.default cat.default",
        "ceil.default clamp.Tensor clamp.default clone.default constant_pad_nd.default convolution.default",
        "copy.default cos.default cosh.default cumprod.default cumsum.default diagonal.default div.Scalar div.Tensor",
        "div.Tensor_mode elu.default embedding.default eq.Scalar eq.Tensor erf.default exp.default expand.default",
        "expm1.default flip.default floor.default fmod.Scalar fmod.Tensor full_like.default gather.default ge.Scalar",
        "ge.Tensor gelu.default getitem gt.Scalar gt.Tensor hardtanh.default index.Tensor index_select.default",
        "isnan.default le.Scalar le.Tensor leaky_relu.default linalg_vector_norm.default linear.default log.default",
        "log10.default log1p.default log2.default logical_and.default logical_not.default logical_or.default",
        "logical_xor.default lt.Scalar lt.Tensor matmul.default max.default max.dim max_pool2d_with_indices.default",
        "max_pool3d_with_indices.default maximum.default mean.default mean.dim min.default minimum.default mm.default",
        "mul.Scalar mul.Tensor native_dropout.default native_group_norm.default native_layer_norm.default ne.Scalar",
        "ne.Tensor neg.default ones_like.default permute.default pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor",
        "prelu.default prod.default prod.dim_int reciprocal.default relu.default remainder.Scalar remainder.Tensor",
        "repeat.default round.decimals round.default rsqrt.default scaled_dot_product_attention.default scatter.value",
        "select.int sigmoid.default sign.default silu.default sin.default sinh.default slice.Tensor",
        "slice_scatter.default sort.default split_with_sizes.default sqrt.default squeeze.dims sub.Scalar sub.Tensor",
        "sum.default sum.dim_IntList tan.default tanh.default topk.default trunc.default unsqueeze.default",
        "upsample_bilinear2d.vec upsample_nearest2d.vec var.correction view.default where.self zeros_like.default",
    )
).split()

# Keywords that a converter honours; another one that is set is refused.
_HONOURED = {
    "_to_copy.default": {"dtype"},
    "addmm.default": {"alpha", "beta"},
    "cumsum.default": {"dtype"},
    "div.Tensor_mode": {"rounding_mode"},
    "full_like.default": {"dtype"},
    "gelu.default": {"approximate"},
    "mean.dim": {"dtype"},
    "ones_like.default": {"dtype"},
    "round.decimals": {"decimals"},
    "scaled_dot_product_attention.default": {"attn_mask", "dropout_p", "is_causal", "scale"},
    "sum.default": {"dtype"},
    "sum.dim_IntList": {"dtype"},
    "var.correction": {"correction", "keepdim"},
    "zeros_like.default": {"dtype"},
}


def converters(importer: ExportedProgramImporter, source: str) -> dict[str, Converter]:
    """What ``importer`` may use for the operators of the program called ``source``, each with its checks."""
    replaced: dict[str, Converter] = {name: _bind(convert, importer) for name, convert in REPLACED.items()}
    known = {**importer.convert_map, **replaced}
    return {name: _checked(known[name], importer, source) for name in _TESTED}


def place_of(node: fx.Node) -> str:
    """Where in the user's model a node comes from, as messages name it."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    return f"node '{node.name}' of module '{paths[-1]}'" if paths else f"node '{node.name}'"


def operator_of(node: fx.Node) -> str:
    """``aten.add.Tensor``: what messages call a node's operator."""
    return str(getattr(node.target, "__name__", node.target)) if not _is_aten(node) else str(node.target)


def _is_aten(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def _bind(convert: Callable[[ExportedProgramImporter, fx.Node], Any], importer: ExportedProgramImporter) -> Converter:
    return lambda node: convert(importer, node)


def _checked(convert: Converter, importer: ExportedProgramImporter, source: str) -> Converter:
    """``convert``, refusing what it would ignore and what it got wrong."""

    def checked(node: fx.Node) -> Any:
        name = getattr(node.target, "__name__", "")
        where = f"{source}: operator {operator_of(node)} at {place_of(node)}"
        for keyword, value in node.kwargs.items():
            if value is not None and keyword not in _MEMORY_KEYWORDS | _HONOURED.get(name, set()):
                raise UnsupportedError(f"{where} is not supported with {keyword}={value}; rewrite that step")
        try:
            result = convert(node)
        except Exception as error:
            raise UnsupportedError(f"{where} is not supported in this form: {first_line(error)}") from error
        if isinstance(result, relax.Call):
            result = importer.block_builder.emit(result)
        _compare_type(result, node, where)
        return result

    return checked


def _compare_type(result: Any, node: fx.Node, where: str) -> None:
    """Refuse a converted node whose shape or data type is not the one that torch recorded."""
    expected = node.meta.get("val")
    if not isinstance(expected, torch.Tensor) or not isinstance(result, relax.Expr):
        return  # several tensors: each is checked where the graph takes it out
    shape = tuple(int(extent) for extent in result.ty.shape)
    dtype = str(result.ty.dtype.dtype)
    wanted = str(expected.dtype).removeprefix("torch.")
    if shape != tuple(expected.shape) or dtype != wanted:
        raise UnsupportedError(
            f"{where} is not supported in this form: it would be imported as {dtype}{list(shape)} where torch has"
            f" {wanted}{list(expected.shape)}"
        )


def first_line(error: Exception) -> str:
    """The first line of an error that has something to say."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
