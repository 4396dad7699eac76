"""``pumice advise``: which technique, which pattern, how much, in which layer, by measurement.

    options of each layer   error, time and bytes of each technique x pattern x level       layer_options, subjects
    sensitivities           what a layer's error does to the network's outputs              sensitivities, stitching
    allocation              the best option of each layer within a budget                   start, allocation
    end to end              compiled, on held-out samples and the user's metric, timed      end_to_end, ledger
    removals                all of it again without some filters or heads, while it pays    advisor, removals
    uniform settings        what has to be beaten                                           uniform

What each step found goes into a work file, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.ir import IRModule

from pumice.advisor.advice import Advice
from pumice.advisor.advisor import Advisor
from pumice.advisor.budget import Budget
from pumice.advisor.end_to_end import Checker, Setting
from pumice.advisor.sensitivities import Tell
from pumice.advisor.stitching import Reference
from pumice.advisor.subjects import Space
from pumice.advisor.survey import Effort, Ground
from pumice.advisor.work_file import open_work_file
from pumice.driver import samples_of
from pumice.errors import UnsupportedError, UsageError
from pumice.evaluation import Metric
from pumice.frontend import read_model
from pumice.module import inputs_of, weights_of
from pumice.passes.calibrate import Samples
from pumice.passes.evaluate import Evaluator
from pumice.passes.simplify import SimplifyModel
from pumice.passes.sparsity import RecordLayers
from pumice.recipe import Recipe
from pumice.stages import Progress, Stages
from pumice.targets.target import Target

_HELD = 4  # every such sample is kept for measuring outcomes
_MOST_HELD = 64
_TIMED = 10  # times as long as a kernel a library is timed


def advise_model(
    model: Any,
    *,
    calibration: Mapping[str, np.ndarray] | str | Path,
    inputs: Any = None,
    metric: Metric | None = None,
    target: str = "native",
    budget: Budget | None = None,
    base: Recipe | None = None,
    space: Space | None = None,
    effort: Effort | None = None,
    tuning_db: str | Path | None = None,
    measure: bool = False,
    threads: int | None = None,
    work_file: str | Path | None = None,
    progress: Progress | None = None,
    tell: Tell = lambda text: None,
) -> Advice:
    """Find the recipe for a model within a budget, and what else could be had.

    ``model``, ``inputs``, ``threads`` and ``calibration`` are those of ``compile_model``; every fourth sample is held
    out. ``base`` is what the recipe says beyond pruning. ``tuning_db`` has the times of kernels; with ``measure`` (on
    this machine only) those that it does not have are measured and added. ``work_file`` keeps what was found.
    ``progress`` hears of stages, ``tell`` of what each found. With more than one process (``Effort``) the caller's
    main module is imported anew in each, so a script's own work belongs under ``if __name__ == "__main__"``.

    Raises what ``compile_model`` does; UsageError for a base that prunes and for a latency in milliseconds where times
    are only comparable; AccuracyBudgetError where even everything reverted loses too much; PerformanceBudgetError,
    with the least that can be reached, where a latency or size cannot be.
    """
    base, effort = base or Recipe(), effort or Effort()
    device = Target.parse(target)
    _check_request(base, device, budget, measure, tuning_db)
    stage = Stages(progress)
    with stage("read the model"):
        mod = read_model(model, inputs)
        samples = samples_of(calibration, mod)
        assert samples is not None
        mod = tvm.transform.Sequential([SimplifyModel(), RecordLayers()])(mod)
        learned, held, note = _split(mod, samples)
    with open_work_file(work_file, _fingerprint(mod, samples, [_device_key(device), base.to_json(), threads])) as work:
        with stage("run the float model"):
            exact = Evaluator(mod)
            reference = Reference(exact.run, list(Samples(mod, held))[:_MOST_HELD])
        setting = Setting(
            model, inputs, learned, reference, metric, device, threads, None if tuning_db is None else str(tuning_db)
        )
        checker = Checker(setting, base.pruning(()), work, _TIMED * effort.seconds)
        ground = Ground(mod, exact, setting, note, checker, work, base, effort, stage, tell)
        return Advisor(ground, space or Space.of(device), budget, measure).advise()


def _check_request(
    base: Recipe, target: Target, budget: Budget | None, measure: bool, tuning_db: str | Path | None
) -> None:
    if base.prune or not base.quantize:
        raise UsageError("the recipe to start from prunes, or leaves int8 out: both are what advise decides")
    if measure and (target.name != "native" or tuning_db is None):
        raise UsageError("kernels are measured on this machine only, and kept: give --target native and --tuning-db")
    if target.runs_on_gpu and budget is not None and budget.kind == "latency":
        raise UnsupportedError(f"--latency for {target.name}: nothing here knows times of GPU kernels; give --size")


def _split(
    mod: IRModule, samples: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], str]:
    """The samples to learn from and those held out, every fourth, and a sentence on it; one alone is both."""
    count = len(Samples(mod, samples))
    if count == 1:
        both = {name: np.asarray(array) for name, array in samples.items()}
        return both, both, "there is one calibration sample, so outputs were compared on what pruning looked at"
    is_held = np.arange(count) % _HELD == _HELD - 1 if count >= _HELD else np.arange(count) == count - 1
    learned, held = {}, {}
    for var in inputs_of(mod):
        array = np.asarray(samples[var.name])
        pieces = array.reshape(count, -1, *array.shape[1:])
        learned[var.name] = pieces[~is_held].reshape(-1, *array.shape[1:])
        held[var.name] = pieces[is_held].reshape(-1, *array.shape[1:])
    compared = min(int(is_held.sum()), _MOST_HELD)
    note = f"{int((~is_held).sum())} calibration samples for pruning and ranges; outputs compared on {compared} others"
    return learned, held, note


def _device_key(device: Target) -> list[str]:
    """What tells one target from another, the same in every process: a set of texts prints in an order of its own."""
    return [device.name, str(device.tvm), device.isa, *sorted(device.features), *device.gpus]


def _fingerprint(mod: IRModule, samples: Mapping[str, np.ndarray], options: Sequence[Any]) -> str:
    """What every finding depends on: the graph and its weights, the data, the options."""
    digest = hashlib.sha256(str(mod["main"]).encode())
    for arrays in (weights_of(mod), samples):
        for name, array in sorted(arrays.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    digest.update(json.dumps(list(options), default=str).encode())
    return digest.hexdigest()


__all__ = ["Effort", "advise_model"]
