"""A compiler pass that brings an imported model to the canonical layer form, which every later pass matches."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.passes.canonicalize_activations import CanonicalizeActivations
from pumice.passes.canonicalize_bias import CanonicalizeBias
from pumice.passes.canonicalize_conv import CanonicalizeConv
from pumice.passes.canonicalize_linear import CanonicalizeLinear
from pumice.passes.fold_batch_norm import FoldBatchNorm
from pumice.passes.fold_constants import FoldConstants
from pumice.passes.fold_masks import FoldMasks
from pumice.passes.fuse_attention import FuseAttention
from pumice.passes.fuse_gelu import FuseGelu
from pumice.passes.fuse_norms import FuseLayerNorm, FuseRMSNorm
from pumice.passes.remove_identities import RemoveIdentities
from pumice.passes.sink_below_dequantize import SinkBelowDequantize


@tvm.transform.module_pass(opt_level=0, name="pumice.SimplifyModel")
class SimplifyModel:
    """The canonical layer form, whatever the importer and the exporter made of the model.

    - convolution: ``nn.conv2d(x NCHW, w OIHW)``, then ``add(y, bias [1, N, 1, 1])`` if there is a bias;
    - linear: ``matmul(x [..., K], w [K, N])``, then ``add(y, bias [N])``;
    - ``nn.relu``, ``clip`` with two bounds, ``nn.gelu``, ``nn.gelu_tanh``, ``nn.layer_norm``, ``nn.rms_norm``;
    - masks and batch norm folded; no dropout, no identities; what weights alone determine is a weight;
    - one dataflow block, in which every variable has a name of its own.
    """

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Run the sequence."""
        return tvm.transform.Sequential(simplification_passes())(mod)


def simplification_passes() -> list[tvm.transform.Pass]:
    """The passes that ``SimplifyModel`` runs, to splice into another pipeline."""
    return [
        # What the model says about its weights
        FoldMasks(),
        RemoveIdentities(),
        FoldConstants(),
        SinkBelowDequantize(),
        # What importers spell out
        CanonicalizeActivations(),
        FuseLayerNorm(),
        FuseRMSNorm(),
        FuseGelu(),
        CanonicalizeLinear(),
        CanonicalizeBias(),
        FuseAttention(),
        # What folds into a layer
        FoldBatchNorm(),
        CanonicalizeConv(),
        SinkBelowDequantize(),
        RemoveIdentities(),
        FoldConstants(),
        relax.transform.DeadCodeElimination(["main"]),
    ]


@relax.register_pipeline("pumice.simplify")  # type: ignore[untyped-decorator]
def simplify_pipeline() -> tvm.transform.Pass:
    """``relax.get_pipeline("pumice.simplify")``."""
    return SimplifyModel()
