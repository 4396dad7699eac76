"""From a lowered module to machine code: the last Relax passes, then LLVM."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.targets.target import Target


def build(lowered: IRModule, target: Target) -> relax.VMExecutable:
    """Compile ``lowered``: every operator a TIR function, but for reshapes, which are views at run time.

    TVM's default pipeline ends likewise; it also looks for reshapes among the TIR functions, where there are none.
    """
    # Weights and records have served: they would be copied into every function's module otherwise.
    functions = IRModule(dict(lowered.functions_items()))
    with tvm.transform.PassContext(opt_level=3):
        return relax.build(functions, target.tvm, relax_pipeline=_finalize())


def _finalize() -> tvm.transform.Sequential:
    transform = relax.transform
    return tvm.transform.Sequential(
        [
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            transform.AttachGlobalSymbol(),
        ]
    )
