"""A recipe carried out to the end: compiled, its outputs held against the float model's, timed where it can be.

Whatever an advisor estimates, this is what it is believed by.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pumice import bench
from pumice.advisor.stitching import Feed, Outputs, Reference
from pumice.advisor.work_file import WorkFile
from pumice.artifact import CompiledModel
from pumice.driver import compile_model
from pumice.evaluation import Metric
from pumice.profile import Profile
from pumice.recipe import Recipe
from pumice.targets.target import Target

_SECONDS = 2.0  # of timing each library


@dataclass(frozen=True)
class Outcome:
    """What a recipe came to.

    nbytes: of the library; milliseconds: of one call on this machine, None where the target is another
    noise, cosine: of the outputs on held-out samples (see ``Closeness``); metrics: the user's, by name
    """

    nbytes: int
    milliseconds: float | None
    noise: float
    cosine: float
    metrics: dict[str, float]


@dataclass(frozen=True, eq=False)
class Setting:
    """What all recipes have in common. ``calibration`` is what compiling gets; ``held`` what outcomes are measured on.

    ``target`` is where times and bytes hold; on any machine the integers are the same, so accuracy is measured here.
    """

    model: Any
    inputs: Any
    calibration: Mapping[str, np.ndarray]
    held: Reference
    metric: Metric | None
    target: Target
    threads: int | None
    tuning_db: str | None = None

    @property
    def is_here(self) -> bool:
        """Whether the target is this machine, so that times can be measured."""
        return self.target.name == "native"

    @property
    def times_key(self) -> str:
        """What tells one tuning database from another, which decides on kernels: its content as it is now."""
        return "" if self.tuning_db is None else hashlib.sha256(Path(self.tuning_db).read_bytes()).hexdigest()

    @property
    def metric_key(self) -> str:
        """What tells one metric from another: its name, and its script as it is now."""
        if self.metric is None:
            return ""
        return f"{self.metric} {hashlib.sha256(self.metric.script.read_bytes()).hexdigest()}"

    def compile(self, recipe: Recipe, target: str) -> CompiledModel:
        """The library. Raises what ``compile_model`` does."""
        return compile_model(
            self.model,
            target=target,
            inputs=self.inputs,
            calibration=self.calibration,
            recipe=recipe,
            threads=self.threads,
            tuning_db=self.tuning_db if target == self.target.name else None,
            measure_errors=False,
            check=False,
        )


@dataclass(frozen=True)
class DenseTimes:
    """Where the time of a dense int8 library goes, nanoseconds: the whole call, and each layer by name."""

    whole: float
    layers: dict[str, float]

    @classmethod
    def of(cls, profile: Profile) -> DenseTimes:
        """The medians."""
        layers = {step.name: 1e3 * step.median_us for step in profile.steps if step.is_layer}
        return cls(1e3 * profile.call_us, layers)


class Checker:
    """Carries recipes out, each once: what the work file has is not done again."""

    def __init__(self, setting: Setting, dense: Recipe, work: WorkFile, seconds: float = _SECONDS) -> None:
        """``dense`` is the recipe that others take turns with when they are timed."""
        self._setting = setting
        self._dense = dense
        self._work = work
        self._seconds = seconds
        self._last: tuple[Recipe, CompiledModel] | None = None

    def outcome(self, recipe: Recipe) -> Outcome:
        """Compile and measure. Raises what ``compile_model`` does, and UsageError from the user's metric."""
        details = (str(recipe.to_json()), self._setting.metric_key, self._setting.times_key, str(self._seconds))
        found = self._work.remember(lambda: asdict(self._carry_out(recipe)), "outcome", *details)
        return Outcome(**found)

    def dense_times(self, recipe: Recipe) -> DenseTimes:
        """The profile on this machine of the library of a recipe that makes nothing zero."""

        def measure() -> dict[str, Any]:
            feed = self._setting.held.feeds[0]
            return asdict(DenseTimes.of(self._library(recipe).profile(feed, self._seconds)))

        details = (str(recipe.to_json()), self._setting.times_key, str(self._seconds))
        return DenseTimes(**self._work.remember(measure, "where the dense time goes", *details))

    def float_metrics(self, run: Callable[[Feed], Outputs]) -> dict[str, float]:
        """The user's metric of the float model."""
        metric = self._setting.metric
        if metric is None:
            return {}
        return self._work.remember(lambda: metric(run), "metric of the float model", self._setting.metric_key)

    @cached_property
    def _dense_library(self) -> CompiledModel:
        return self._setting.compile(self._dense, self._setting.target.name)

    def _library(self, recipe: Recipe) -> CompiledModel:
        """For the target; the dense one and the last one are kept."""
        if recipe == self._dense:
            return self._dense_library
        if self._last is None or self._last[0] != recipe:
            self._last = None  # not two at a time
            self._last = (recipe, self._setting.compile(recipe, self._setting.target.name))
        return self._last[1]

    def _carry_out(self, recipe: Recipe) -> Outcome:
        setting = self._setting
        library = self._library(recipe)
        runnable = library if setting.is_here else setting.compile(recipe, "native")

        def run(feed: Feed) -> Outputs:
            return runnable(**feed)

        closeness = setting.held.closeness(run)
        metrics = setting.metric(run) if setting.metric else {}
        milliseconds = self._time(library) if setting.is_here else None
        return Outcome(library.path.stat().st_size, milliseconds, closeness.noise, closeness.cosine, metrics)

    def _time(self, library: CompiledModel) -> float:
        """The median call, in turns with the dense library: the ratio is what a machine's moods leave alone."""
        feed = self._setting.held.feeds[0]
        dense = self.dense_times(self._dense).whole / 1e6
        if library is self._dense_library:
            return dense
        engines = {"dense": lambda: self._dense_library(**feed), "this": lambda: library(**feed)}
        return dense * bench.measure(engines, self._seconds)[1].ratio
