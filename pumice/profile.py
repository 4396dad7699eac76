"""Where the time of one inference goes: every step of a library timed by itself, in order, again and again."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pumice.record import LayerRecord
from pumice.report_table import clean, format_table

_MIN_ROUNDS = 5


@dataclass(frozen=True)
class StepTime:
    """One kernel call: its median time in microseconds and its share of all steps together.

    For a layer, ``macs`` counts its multiply-adds as if dense, ``macs_done`` those with a weight that is not zero,
    and ``gops`` is the speed in 10^9 operations a second as if dense (two to a multiply-add).
    """

    name: str  # the layer's name, or the operator's between layers
    kernel: str
    is_layer: bool
    median_us: float
    share: float
    macs: int = 0
    macs_done: int = 0
    gops: float | None = None


@dataclass(frozen=True)
class Profile:
    """The times of all steps in execution order, and what surrounds them, in microseconds."""

    steps: list[StepTime]
    inference_us: float  # all steps in one go
    call_us: float  # the call from Python: inputs checked and copied in, outputs copied out
    rounds: int

    @property
    def layers_us(self) -> float:
        """The layers' steps together."""
        return sum(step.median_us for step in self.steps if step.is_layer)

    @property
    def between_us(self) -> float:
        """What runs between the layers, together."""
        return sum(step.median_us for step in self.steps if not step.is_layer)

    def to_json(self) -> dict[str, Any]:
        """As the key ``layers`` of ``bench --layers --json``."""
        return {**asdict(self), "layers_us": self.layers_us, "between_us": self.between_us}

    def __str__(self) -> str:
        headings = ("step", "kernel", "us", "share", "multiply-adds", "done", "GOP/s as if dense")
        rows = [headings, *(_row(step) for step in self.steps)]
        layers = sum(step.is_layer for step in self.steps)
        totals = {
            f"{layers} steps in layers": self.layers_us,
            f"{len(self.steps) - layers} steps between them": self.between_us,
            "one inference, all steps in one go": self.inference_us,
            "one call, inputs and outputs copied": self.call_us,
        }
        whole = self.layers_us + self.between_us or 1.0
        summary = [f"{name:<36} {value:>10.1f} us  {100 * value / whole:5.1f} %" for name, value in totals.items()]
        return "\n".join([*format_table(rows, 140, {"step", "kernel"}), "", *summary])


def profile_steps(
    run: Callable[..., Any],
    call: Callable[[], Any],
    steps: Sequence[dict[str, Any]],
    layers: Sequence[LayerRecord],
    seconds: float,
) -> Profile:
    """Time the steps that ``run(first, last)`` runs for about ``seconds``; at least five rounds.

    A round runs ``call``, the whole inference, and then each step alone but in order, so that each finds what the
    steps before it left, in memory and in the caches. ``steps`` and ``layers`` are the manifest's.
    """
    stop = time.perf_counter() + seconds
    single: list[list[float]] = []
    whole, calls, empty = [], [], []
    collecting = gc.isenabled()
    gc.disable()
    try:
        while time.perf_counter() < stop or len(single) < _MIN_ROUNDS:
            calls.append(_time(call))
            whole.append(_time(run))
            empty.append(_time_steps(run, 0, 0))
            single.append([_time_steps(run, k, k + 1) for k in range(len(steps))])
    finally:
        if collecting:
            gc.enable()
    overhead = float(np.median(empty))
    medians = np.maximum(np.median(single, axis=0) - overhead, 0.0) if steps else np.zeros(0)
    times = [
        _step_time(step, float(median), float(medians.sum()), layers)
        for step, median in zip(steps, medians, strict=True)
    ]
    return Profile(times, float(np.median(whole)), float(np.median(calls)), len(single))


def _time(run: Callable[..., Any], *arguments: int) -> float:
    """Microseconds of one call."""
    start = time.perf_counter_ns()
    run(*arguments)
    return (time.perf_counter_ns() - start) / 1e3


def _time_steps(run: Callable[..., Any], first: int, last: int) -> float:
    """Microseconds of some steps, with the call; the one before it brings Python's own code back into the caches."""
    run(first, first)
    return _time(run, first, last)


def _step_time(step: dict[str, Any], median: float, total: float, layers: Sequence[LayerRecord]) -> StepTime:
    share = median / total if total else 0.0
    record = next((layer for layer in layers if layer.name == step["layer"]), None)
    if record is None:
        return StepTime(step["kernel"], step["kernel"], False, median, share)
    gops = 2e-3 * record.macs / median if median else None
    done = round(record.macs * (1 - record.sparsity))
    return StepTime(record.name, record.kernel, True, median, share, record.macs, done, gops)


def _row(step: StepTime) -> tuple[str, ...]:
    work = (f"{step.macs:,}", f"{step.macs_done:,}") if step.is_layer else ("", "")
    gops = "" if step.gops is None else f"{step.gops:,.0f}"
    return (clean(step.name), step.kernel, f"{step.median_us:.1f}", f"{100 * step.share:.1f} %", *work, gops)
