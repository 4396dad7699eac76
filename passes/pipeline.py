"""From a quantized (or float) module form to one that TVM can build: Pumice's kernels, then the rest."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.passes.lower_packed import LowerPacked
from pumice.targets.target import Target


@dataclass(frozen=True)
class LowerOptions:
    """``threads``: how many the library will use at most."""

    threads: int = 1


def lower(mod: IRModule, target: Target, options: LowerOptions | None = None) -> IRModule:
    """``mod`` (module form) with every operator a TIR function, ready for ``relax.build``, still with its weights."""
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
            LowerPacked(target, options.threads),
            # Phase 2: what is left becomes TIR, fused and scheduled for a CPU.
            relax.transform.LegalizeOps(skip_ops=["relax.reshape"]),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(["main"]),
        ]
    )
