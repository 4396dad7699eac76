"""Passes: module in, module out. Each works in any Relax pipeline."""

from pumice.passes.calibrate import Calibrate, read_calibration
from pumice.passes.canonicalize_activations import CanonicalizeActivations
from pumice.passes.canonicalize_bias import CanonicalizeBias
from pumice.passes.canonicalize_conv import CanonicalizeConv
from pumice.passes.canonicalize_linear import CanonicalizeLinear
from pumice.passes.check_zeros import NoPrunedWeightCameBack
from pumice.passes.correct_bias import CorrectBias
from pumice.passes.equalize import EqualizeChannels
from pumice.passes.fold_batch_norm import FoldBatchNorm
from pumice.passes.fold_constants import FoldConstants
from pumice.passes.fold_masks import FoldMasks
from pumice.passes.fuse_attention import FuseAttention
from pumice.passes.fuse_gelu import FuseGelu
from pumice.passes.fuse_norms import FuseLayerNorm, FuseRMSNorm
from pumice.passes.layer_error import RecordLayerErrors
from pumice.passes.lower_packed import LowerPacked
from pumice.passes.permute_channels import PermuteChannels
from pumice.passes.prune import Prune
from pumice.passes.prune_spec import OBC, Filters, Heads, Magnitude, NearZero, PruneSpec, SparseGPT, Wanda, parse_prune
from pumice.passes.quantization_plan import QuantizeSpec, plan_quantization
from pumice.passes.quantize import Quantize
from pumice.passes.reconstruct import Reconstruct, ReconstructSpec
from pumice.passes.remove_filters import RemoveFilters
from pumice.passes.remove_heads import RemoveHeads
from pumice.passes.remove_identities import RemoveIdentities
from pumice.passes.round_weights import RoundWeights
from pumice.passes.simplify import SimplifyModel, simplification_passes
from pumice.passes.sink_below_dequantize import SinkBelowDequantize
from pumice.passes.smooth_activations import SmoothActivations
from pumice.passes.sparsity import RecordLayers
from pumice.passes.split_errors import SplitErrors
from pumice.passes.weights import AdoptWeights, BindWeights

__all__ = [
    "OBC",
    "AdoptWeights",
    "BindWeights",
    "Calibrate",
    "CanonicalizeActivations",
    "CanonicalizeBias",
    "CanonicalizeConv",
    "CanonicalizeLinear",
    "CorrectBias",
    "EqualizeChannels",
    "Filters",
    "FoldBatchNorm",
    "FoldConstants",
    "FoldMasks",
    "FuseAttention",
    "FuseGelu",
    "FuseLayerNorm",
    "FuseRMSNorm",
    "Heads",
    "LowerPacked",
    "Magnitude",
    "NearZero",
    "NoPrunedWeightCameBack",
    "PermuteChannels",
    "Prune",
    "PruneSpec",
    "Quantize",
    "QuantizeSpec",
    "Reconstruct",
    "ReconstructSpec",
    "RecordLayerErrors",
    "RecordLayers",
    "RemoveFilters",
    "RemoveHeads",
    "RemoveIdentities",
    "RoundWeights",
    "SimplifyModel",
    "SinkBelowDequantize",
    "SmoothActivations",
    "SparseGPT",
    "SplitErrors",
    "Wanda",
    "parse_prune",
    "plan_quantization",
    "read_calibration",
    "simplification_passes",
]
