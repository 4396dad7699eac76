"""Measuring the kernels of a model's layers on this machine: what ``pumice tune`` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.ir import IRModule

from pumice.driver import samples_of
from pumice.frontend import read_model
from pumice.kernel_times import measure
from pumice.module import inputs_of
from pumice.passes.choose_kernel import Choice, Chooser, candidates
from pumice.passes.layer_kernel import LayerWork
from pumice.passes.lower_packed import LowerPacked
from pumice.passes.prune_spec import PruneSpec
from pumice.prepare import Masks, prepare
from pumice.recipe import Recipe, recipe_of
from pumice.schedules.measurements import Journal, Machine, Measurement, open_journal
from pumice.schedules.tiling import Candidate
from pumice.stages import Progress, Stages
from pumice.targets.isa import Isa, isa
from pumice.targets.target import Target
from pumice.threads import check_threads


@dataclass(frozen=True)
class Tuned:
    """One layer's times in nanoseconds, and how far the whole is.

    layers: the layers that it stands for, being alike; depth: input channels in a word
    is_new: measured now, not found in the database
    number, count: of layers that differ; seconds_left: an estimate
    """

    layers: tuple[str, ...]
    depth: int
    times: Mapping[Candidate, float]
    is_new: bool
    number: int
    count: int
    seconds_left: float

    @property
    def best(self) -> Candidate:
        """The fastest."""
        return min(self.times, key=lambda candidate: self.times[candidate])

    @property
    def dense(self) -> float:
        """The time of the best dense kernel."""
        return min(time for (form, _), time in self.times.items() if form.is_dense)


def tune_model(
    model: Any,
    output: str | Path,
    *,
    inputs: Any = None,
    calibration: Mapping[str, np.ndarray] | str | Path | None = None,
    recipe: Recipe | str | Path | None = None,
    prune: str | PruneSpec | Sequence[str | PruneSpec] | None = None,
    masks: Masks | None = None,
    keep_float: Sequence[str] | None = None,
    quantize: bool | None = None,
    threads: int | None = None,
    seconds: float = 0.2,
    progress: Progress | None = None,
    tell: Callable[[Tuned], None] = lambda tuned: None,
) -> list[Tuned]:
    """Measure the kernels of each layer and add their times to the database ``output``; what it has is not measured.

    The model's arguments are those of ``compile_model``. Calibration data may be left out: time does not depend on
    scales, and random data will do. ``seconds`` are spent on each kernel; ``tell`` hears of every layer when it is
    done. Interrupted, the database holds the layers that are done, and another call goes on from there.

    Raises what ``compile_model`` does; UsageError for a file that is no database; PumiceError where two kernels of a
    layer differ in their results.
    """
    pool = check_threads(threads)
    target = Target.parse("native")
    chosen = recipe_of(recipe).but(
        prune=prune, keep_float=keep_float, quantize=quantize, equalize=False, correct_bias=False
    )
    with open_journal(output, Machine.of(target, pool)) as journal:
        stage = Stages(progress)
        with stage("read the model"):
            mod = read_model(model, inputs)
        arrays = _random_inputs(mod) if calibration is None else samples_of(calibration, mod)
        mod = prepare(mod, chosen, arrays, masks, stage)
        results = []
        for tuned in _tune(_groups(mod, target, pool), journal, target, pool, seconds):
            tell(tuned)
            results.append(tuned)
        return results


def _random_inputs(mod: IRModule) -> dict[str, np.ndarray]:
    """One sample; integers are 0 or 1, which any table of embeddings has."""
    draw = np.random.default_rng(0)
    arrays = {}
    for var in inputs_of(mod):
        shape, dtype = [int(size) for size in var.ty.shape], np.dtype(str(var.ty.dtype))
        values = draw.standard_normal(shape) if dtype.kind == "f" else draw.integers(0, 2, shape)
        arrays[var.name] = np.asarray(values, dtype)
    return arrays


def _tune(
    groups: Sequence[list[LayerWork]], journal: Journal, target: Target, threads: int, seconds: float
) -> Iterator[Tuned]:
    """Each group's times: what the journal has, if it has all candidates, else measured and written to it."""
    plans = [candidates(group[0], isa(target.isa)) for group in groups]
    known = [journal.measurements.of(group[0].workload) for group in groups]
    is_new = [not times.keys() >= set(plan) for plan, times in zip(plans, known, strict=True)]
    left = sum(len(plan) for plan, new in zip(plans, is_new, strict=True) if new)
    start, done = time.perf_counter(), 0
    for number, (group, plan, times, new) in enumerate(zip(groups, plans, known, is_new, strict=True), 1):
        if new:
            times = measure(group[0], plan, target, threads, seconds)
            journal.add([Measurement(group[0].workload, *item) for item in times.items()])
            done, left = done + len(plan), left - len(plan)
        pace = (time.perf_counter() - start) / max(done, 1)
        names = tuple(work.name for work in group)
        yield Tuned(names, group[0].depth, times, new, number, len(groups), pace * left)


@dataclass(eq=False)
class _Collector(Chooser):
    """Chooses as usual, and keeps what it was asked about."""

    found: list[LayerWork] = field(default_factory=list)

    def choose(self, work: LayerWork, isa: Isa) -> Choice:
        """The choice by the cost table."""
        self.found.append(work)
        return super().choose(work, isa)


def layer_works(mod: IRModule, target: Target, threads: int) -> list[LayerWork]:
    """The layers of ``mod`` that have a kernel, as they would be lowered."""
    collector = _Collector()
    with target.tvm, tvm.transform.PassContext(opt_level=3):
        tvm.transform.Sequential([LowerPacked(target, threads, collector)])(mod)
    return collector.found


def _groups(mod: IRModule, target: Target, threads: int) -> list[list[LayerWork]]:
    """Those that are alike together."""
    groups: list[list[LayerWork]] = []
    for work in layer_works(mod, target, threads):
        for group in groups:
            if group[0].workload.resembles(work.workload):
                group.append(work)
                break
        else:
            groups.append([work])
    return groups
