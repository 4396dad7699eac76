"""The times of several kernels that compute one layer, and the proof that they compute the same.

They are compiled into one module as the steps of a plan, so they are called as a library calls them, and take turns.
Each has some copies of its weights and of its output and goes through these in order, because in a network the other
layers come in between: a weight was read, a residual written and an output's place last used long ago. The input stays
where it is, for there the layer before has just written it. And the copies of a sparse weight have their rows in other
orders, for a CPU learns the lengths of a few thousand lists by heart, which it cannot in a network.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from pumice.errors import PumiceError
from pumice.passes.layer_kernel import LayerKernel, LayerWork, layer_kernel, weight_in
from pumice.schedules.blocks import QUAD, sparse_blocks
from pumice.schedules.tiling import Candidate
from pumice.targets.executor import Executor, build_executor
from pumice.targets.isa import isa
from pumice.targets.plan import FIRST_INPUT, WEIGHTS, WORKSPACE, Plan, Step, View, align, aligned
from pumice.targets.target import Target

_BYTES = 4 << 20  # that a kernel goes through before it sees the same again: more than an L2 cache has
_MOST_COPIES = 16
_LEAST_ROUNDS = 5
_TOLERANCE = 1e-5  # of float sums in another order, times the square root of their length


def measure(work: LayerWork, candidates: Sequence[Candidate], target: Target, seconds: float) -> dict[Candidate, float]:
    """The median nanoseconds of each candidate, after about ``seconds`` of each; on this thread's pool.

    Raises PumiceError, with the name of the candidate, where results differ from those of the first.
    """
    kernels = [
        layer_kernel(work, weight_in(work.numbers.rows, candidate, isa(target.isa)), candidate[1])
        for candidate in candidates
    ]
    copies = [_copies(kernel, work) for kernel in kernels]
    weights = [_shuffled(work, *each) for each in zip(candidates, kernels, copies, strict=True)]
    executor = build_executor(_plan(work, kernels, weights, target), target)
    last = np.cumsum(copies)
    spans = list(zip((last - copies).tolist(), last.tolist(), strict=True))
    _check(work, candidates, executor, [first for first, _ in spans])
    return dict(zip(candidates, _take_turns(executor, spans, seconds), strict=True))


def _copies(kernel: LayerKernel, work: LayerWork) -> int:
    size = sum(array.nbytes for array in kernel.constants.values()) + _output_bytes(work)
    return max(1, min(_MOST_COPIES, -(-_BYTES // size)))


def _shuffled(work: LayerWork, candidate: Candidate, kernel: LayerKernel, count: int) -> list[dict[str, np.ndarray]]:
    """The constants of each copy: the layer's own, then those of its quads of rows in other orders."""
    form, tiling = candidate
    rows = work.numbers.rows
    if tiling is None or form.is_dense or len(rows) % QUAD:
        return [kernel.constants] * count
    whole, draw = sparse_blocks(rows, form.shared), np.random.default_rng(0)
    orders = [draw.permutation(len(rows) // QUAD) for _ in range(count - 1)]
    others = [layer_kernel(work, whole.with_quads(order).tiled(tiling.words), tiling).constants for order in orders]
    return [kernel.constants, *others]


def _output_bytes(work: LayerWork) -> int:
    return math.prod(work.output_shape) * np.dtype(work.epilogue.output).itemsize


def _plan(
    work: LayerWork, kernels: Sequence[LayerKernel], weights: Sequence[list[dict[str, np.ndarray]]], target: Target
) -> Plan:
    """All kernels, each as many times in a row as it has copies; the first copy is what the caller fills and reads."""
    most = max(map(len, weights))
    memory = _Memory()
    shape = (work.source_rows, work.places.source.positions, work.depth)
    output = (work.output_shape, work.epilogue.output)
    inputs = [(shape, "uint8" if work.numbers.dtype == "int8" else "float32")]
    inputs += [output] if work.epilogue.residual else []
    size = align(_output_bytes(work))
    outputs = [View(FIRST_INPUT + len(inputs)), *(View(WORKSPACE, i * size) for i in range(most - 1))]
    mask = [memory.add(work.places.target.mask)] if work.places.target.is_padded else []
    functions, steps = {}, []
    for number, (kernel, copies) in enumerate(zip(kernels, weights, strict=True)):
        name = f"candidate_{number}"
        functions[name] = kernel.make(kernel.work, isa(target.isa), name)
        for i, constants in enumerate(copies):
            arguments = [View(FIRST_INPUT), *(memory.add(array) for array in constants.values())]
            if work.epilogue.residual:  # of the later copies, the output that was written the longest ago
                arguments.append(outputs[(i + 1) % len(copies)] if i else View(FIRST_INPUT + 1))
            steps.append(Step(name, (*arguments, *mask, outputs[i])))
    return Plan(functions, tuple(steps), memory.weights(), (most - 1) * size, tuple(inputs), (output,))


class _Memory:
    """Arrays one after the other, aligned."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._size = 0

    def add(self, array: np.ndarray) -> View:
        """Where ``array`` will lie."""
        view = View(WEIGHTS, self._size)
        self._arrays.append(array)
        self._size += align(array.nbytes)
        return view

    def weights(self) -> np.ndarray:
        """All of them."""
        memory, at = aligned((self._size,), "uint8"), 0
        for array in self._arrays:
            memory[at : at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            at += align(array.nbytes)
        return memory


def _check(work: LayerWork, candidates: Sequence[Candidate], executor: Executor, steps: Sequence[int]) -> None:
    """Integers must be the same, floats nearly so."""
    draw = np.random.default_rng(0)
    for buffer in executor.inputs:
        is_bytes = buffer.dtype == np.uint8
        buffer[...] = draw.integers(0, 256, buffer.shape) if is_bytes else draw.standard_normal(buffer.shape)
    expected = None
    for candidate, step in zip(candidates, steps, strict=True):
        (output,) = executor.outputs
        output.fill(0)
        executor.run(step, step + 1)
        if expected is None:
            expected = output.copy()
        elif not _agree(output, expected, work):
            names = [
                f"{form.describe(work.depth)} {tiling or ''}".rstrip() for form, tiling in (candidate, candidates[0])
            ]
            raise PumiceError(
                f"layer {work.name}: its kernel {names[0]} gives other numbers than {names[1]}: this is a mistake in "
                "Pumice, please report it"
            )


def _agree(output: np.ndarray, expected: np.ndarray, work: LayerWork) -> bool:
    if work.numbers.dtype == "int8":
        return np.array_equal(output, expected)
    length = math.prod(work.numbers.rows.shape[1:])
    limit = _TOLERANCE * math.sqrt(length) * float(np.abs(expected).max(initial=0.0))
    return bool(np.allclose(output, expected, rtol=0, atol=max(limit, 1e-30)))


def _take_turns(executor: Executor, spans: Sequence[tuple[int, int]], seconds: float) -> list[float]:
    """The median nanoseconds of one step of each span; a pass that is not counted goes before every pass that is."""
    spent: list[list[float]] = [[] for _ in spans]
    stop = time.perf_counter() + seconds * len(spans)
    while time.perf_counter() < stop or len(spent[0]) < _LEAST_ROUNDS:
        for (first, last), times in zip(spans, spent, strict=True):
            executor.run(first, last)
            start = time.perf_counter_ns()
            executor.run(first, last)
            times.append((time.perf_counter_ns() - start) / (last - first))
    return [float(np.median(times)) for times in spent]
