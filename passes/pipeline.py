"""From a quantized (or float) module form to kernel calls: Pumice's kernels, then the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.passes.choose_kernel import Chooser
from pumice.passes.contract_products import ContractProducts
from pumice.passes.lower_packed import LowerPacked
from pumice.targets.target import Target


@dataclass(frozen=True)
class LowerOptions:
    """``threads``: how many the library will use at most; ``chooser`` decides on the form of each layer's weight."""

    threads: int = 1
    chooser: Chooser = field(default_factory=Chooser)


def lower(mod: IRModule, target: Target, options: LowerOptions | None = None) -> IRModule:
    """``mod`` (module form) with every operator a TIR function, ready for ``link_steps``, still with its weights."""
    options = options or LowerOptions()
    with target.tvm, tvm.transform.PassContext(opt_level=3):
        return lowering(target, options)(mod)


@relax.register_pipeline("pumice.lower")  # type: ignore[untyped-decorator]
def lower_pipeline(target: str = "native", threads: int = 1) -> tvm.transform.Pass:
    """``relax.get_pipeline("pumice.lower", target="x86-64-v3")``: the sequence for a target by name."""
    return lowering(Target.parse(target), LowerOptions(threads))


def lowering(target: Target, options: LowerOptions) -> tvm.transform.Sequential:
    """The registered sequence, to splice into a pipeline of one's own."""
    return tvm.transform.Sequential(
        [
            # Phase 1: layers and what runs between them, on packed activations.
            LowerPacked(target, options.threads, options.chooser),
            # Phase 2: what is left becomes TIR, fused and scheduled for a CPU.
            relax.transform.LegalizeOps(skip_ops=["relax.reshape"]),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(["main"]),
            # Phase 3: how floats are rounded is no longer the compilers' choice.
            ContractProducts(target),
        ]
    )
