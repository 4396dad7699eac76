"""The C source of what a library knows of its model: the tables that ``runtime/model.h`` declares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import DataType

from pumice.targets.check import Check, checksum
from pumice.targets.plan import WEIGHTS, Plan, Spec, align
from pumice.targets.target import Target


@dataclass(frozen=True)
class ModelTables:
    """What ``source`` writes down; ``inputs`` and ``outputs`` are the names of the plan's, ``scratch`` is in bytes."""

    plan: Plan
    target: Target
    inputs: Sequence[str]
    outputs: Sequence[str]
    scratch: int
    check: Check | None = None

    def source(self) -> str:
        """model.c: the same text for the same model."""
        plan = self.plan
        exact = self.check.exact if self.check else len(plan.steps)
        tolerance = float(self.check.tolerance).hex() if self.check else "0"
        pieces, stored = self._pieces(), self.check_bytes()
        tensors = [self._tensors("inputs", self.inputs, plan.inputs)]
        tensors.append(self._tensors("outputs", self.outputs, plan.outputs))
        return f"""#include "model.h"

{"".join(tensors)}{self._steps()}{c_array("const model_piece", "pieces", pieces)}
{c_array("const char *const", "features", map(_string, sorted(self.target.features)))}
{c_array("const uint64_t", "check", map(str, self._check_offsets())) if self.check else ""}
const model_tables pumice_model = {{
    .input_count = {len(plan.inputs)},
    .output_count = {len(plan.outputs)},
    .step_count = {len(plan.steps)},
    .piece_count = {len(pieces)},
    .feature_count = {len(self.target.features)},
    .inputs = inputs,
    .outputs = outputs,
    .steps = steps,
    .results = results,
    .pieces = pieces,
    .features = features,
    .target = {_string(self.target.name)},
    .workspace = {plan.workspace},
    .scratch = {self.scratch},
    .exact_steps = {exact},
    .tolerance = {tolerance},
    .check = {"check" if self.check else 0},
    .check_bytes = {len(stored)},
    .check_checksum = {checksum(stored):#x},
}};
"""

    def _pieces(self) -> list[str]:
        """The weights, cut where an argument of a step begins; without a check nobody asks for them."""
        first: dict[int, int] = {}
        for number, step in enumerate(self.plan.steps if self.check else ()):
            for view in step.arguments:
                if view.buffer == WEIGHTS:
                    first.setdefault(view.offset, number)
        ends = [*sorted(first)[1:], self.plan.weights.nbytes]
        return [
            f"{{{start}, {end - start}, {checksum(self.plan.weights[start:end].data):#x}, {first[start]}}}"
            for start, end in zip(sorted(first), ends, strict=bool(first))
        ]

    def check_bytes(self) -> bytes:
        """What ``pumice_check`` holds: the stored arrays, each aligned."""
        return b"".join(array.tobytes() + bytes(align(array.nbytes) - array.nbytes) for array in self._stored())

    def _stored(self) -> list[np.ndarray]:
        if self.check is None:
            return []
        is_exact = self.check.exact >= len(self.plan.steps)
        return [*self.check.inputs, *(() if is_exact else self.check.outputs)]

    def _check_offsets(self) -> list[int]:
        sizes = [align(array.nbytes) for array in self._stored()]
        return [sum(sizes[:i]) for i in range(len(sizes))]

    def _tensors(self, kind: str, names: Sequence[str], specs: Sequence[Spec]) -> str:
        rows, shapes = [], []
        for i, (name, (shape, dtype)) in enumerate(zip(names, specs, strict=True)):
            shapes.append(c_array("const uint64_t", f"{kind}_{i}", map(str, shape)))
            rows.append(f"{{{_string(name)}, {_string(dtype)}, {_bytes(shape, dtype)}, {len(shape)}, {kind}_{i}}}")
        return "".join(shapes) + c_array("const pumice_tensor", kind, rows)

    def _steps(self) -> str:
        steps: list[str] = []
        results: list[str] = []
        checksums = self.check.checksums if self.check else [0] * len(self.plan.steps)
        for step, sum_ in zip(self.plan.steps, checksums, strict=True):
            first = len(results)
            for view, size in zip(step.results, step.outputs, strict=True):
                results.append(f"{{{view.buffer}, {view.offset}, {size}}}")
            steps.append(f"{{{_string(step.layer or step.kernel)}, {sum_:#x}, {first}, {len(results)}}}")
        return c_array("const model_view", "results", results) + c_array("const model_step", "steps", steps)


def c_array(type_: str, name: str, values: Iterable[str]) -> str:
    """The definition of a static array; C has none without elements."""
    rows = ",\n    ".join(values) or "0"
    return f"static {type_} {name}[] = {{\n    {rows}\n}};\n"


def _string(text: str) -> str:
    """A literal of UTF-8; octal, since an escape of three digits ends by itself."""
    return '"' + "".join(chr(c) if chr(c).isalnum() and c < 128 else f"\\{c:03o}" for c in text.encode()) + '"'


def _bytes(shape: Sequence[int], dtype: str) -> int:
    parsed = DataType(dtype)
    return math.prod(shape) * -(-int(parsed.bits) * int(parsed.lanes) // 8)
