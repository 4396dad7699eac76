"""The times of several kernels that compute one layer, and the proof that they compute the same.

They are the steps of a plan in one library, on the threads that the network will run on, and take turns.
Each has some copies of its weights and of its output and goes through these in order, because in a network the other
layers come in between: a weight was read, a residual written and an output's place last used long ago. The input stays
where it is, for there the layer before has just written it. And the copies of a sparse weight have their rows in other
orders, for a CPU learns the lengths of a few thousand lists by heart, which it cannot in a network.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from pumice.errors import PumiceError
from pumice.loader import Model
from pumice.passes.layer_kernel import LayerKernel, LayerWork, layer_kernel, weight_in
from pumice.schedules.blocks import QUAD
from pumice.schedules.tiling import Candidate
from pumice.targets.executor import link_model
from pumice.targets.isa import Isa
from pumice.targets.plan import FIRST_INPUT, WEIGHTS, WORKSPACE, Plan, Step, View, align, aligned
from pumice.targets.target import Target

_BYTES = 4 << 20  # that a kernel goes through before it sees the same again: more than an L2 cache has
_MOST_COPIES = 16
_LEAST_ROUNDS = 5
_TOLERANCE = 1e-5  # of float sums in another order, times the square root of their length


def measure(
    work: LayerWork, candidates: Sequence[Candidate], target: Target, threads: int, seconds: float
) -> dict[Candidate, float]:
    """The median nanoseconds of each candidate on ``threads`` threads, after about ``seconds`` of each.

    Raises PumiceError, with the name of the candidate, where results differ from those of the first.
    """
    kernels = [
        layer_kernel(work, weight_in(work.numbers.rows, candidate, target.instructions, work.places), candidate[1])
        for candidate in candidates
    ]
    copies = [_copies(kernel, work) for kernel in kernels]
    weights = [_shuffled(work, *each, target.instructions) for each in zip(candidates, kernels, copies, strict=True)]
    last = np.cumsum(copies)
    spans = list(zip((last - copies).tolist(), last.tolist(), strict=True))
    with link_model(_plan(work, kernels, weights, target), target, threads) as model:
        arrays = _Arrays(model)
        _check(work, candidates, arrays, [first for first, _ in spans])
        return dict(zip(candidates, _take_turns(arrays.run, spans, seconds), strict=True))


def _copies(kernel: LayerKernel, work: LayerWork) -> int:
    size = sum(array.nbytes for array in kernel.constants.values()) + _output_bytes(work)
    return max(1, min(_MOST_COPIES, -(-_BYTES // size)))


def _shuffled(
    work: LayerWork, candidate: Candidate, kernel: LayerKernel, count: int, isa: Isa
) -> list[dict[str, np.ndarray]]:
    """The constants of each copy: the layer's own, then those of its rows in other orders."""
    form, tiling = candidate
    rows = work.numbers.rows
    if tiling is None or form.is_dense or len(rows) % QUAD:
        return [kernel.constants] * count
    lists, draw = rows.reshape(-1, form.shared, *rows.shape[1:]), np.random.default_rng(0)
    others = [draw.permutation(lists).reshape(rows.shape) for _ in range(count - 1)]
    weights = [weight_in(other, candidate, isa, work.places) for other in others]
    return [kernel.constants, *(layer_kernel(work, weight, tiling).constants for weight in weights)]


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
        functions[name] = kernel.make(kernel.work, target.instructions, name)
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


class _Arrays:
    """A model with the arrays that it reads and writes."""

    def __init__(self, model: Model) -> None:
        self.inputs = [aligned(spec.shape, spec.dtype) for spec in model.inputs]
        self.outputs = [aligned(spec.shape, spec.dtype) for spec in model.outputs]
        self._model = model

    def run(self, first: int, last: int) -> None:
        """Run the steps from ``first`` up to but without ``last``."""
        self._model.run(self.inputs, self.outputs, first, last)


def _check(work: LayerWork, candidates: Sequence[Candidate], arrays: _Arrays, steps: Sequence[int]) -> None:
    """Integers must be the same, floats nearly so; what lies beyond the pixels, each kernel may write as it likes."""
    pixels = work.places.target.pixel_positions.ravel()
    draw = np.random.default_rng(0)
    for buffer in arrays.inputs:
        is_bytes = buffer.dtype == np.uint8
        buffer[...] = draw.integers(0, 256, buffer.shape) if is_bytes else draw.standard_normal(buffer.shape)
    expected = None
    for candidate, step in zip(candidates, steps, strict=True):
        (output,) = arrays.outputs
        output.fill(0)
        arrays.run(step, step + 1)
        found = output[:, pixels]
        if expected is None:
            expected = found
        elif not _agree(found, expected, work):
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


def _take_turns(run: Callable[[int, int], None], spans: Sequence[tuple[int, int]], seconds: float) -> list[float]:
    """The median nanoseconds of one step of each span, without what a call of no step takes.

    A pass that is not counted goes before every pass that is.
    """
    spent: list[list[float]] = [[] for _ in spans]
    empty = []
    stop = time.perf_counter() + seconds * len(spans)
    while time.perf_counter() < stop or len(spent[0]) < _LEAST_ROUNDS:
        for (first, last), times in zip(spans, spent, strict=True):
            run(first, last)
            times.append(_time(run, first, last))
            empty.append(_time(run, first, first))
    call = float(np.median(empty))
    return [
        max(float(np.median(times)) - call, 1.0) / (last - first)
        for (first, last), times in zip(spans, spent, strict=True)
    ]


def _time(run: Callable[[int, int], None], first: int, last: int) -> int:
    """Nanoseconds of one call."""
    start = time.perf_counter_ns()
    run(first, last)
    return time.perf_counter_ns() - start
