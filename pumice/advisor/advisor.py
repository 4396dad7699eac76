"""From the options of layers to advice: sensitivities, allocations, and what comes of each when it is carried out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pumice.advisor.advice import Advice, Point, cost_of, drop_of
from pumice.advisor.allocation import Choice, Problem, allocate, reversals
from pumice.advisor.budget import Budget
from pumice.advisor.cost_model import CostModel, dense_choice
from pumice.advisor.layer_options import ESTIMATED
from pumice.advisor.sensitivities import look_at_each, search
from pumice.advisor.stitching import Reference, recipe_of
from pumice.advisor.subjects import Space, spec_of
from pumice.advisor.survey import Ground, Layers
from pumice.advisor.training import training_lines
from pumice.errors import AccuracyBudgetError, PerformanceBudgetError, UsageError
from pumice.module import source_of
from pumice.passes.calibrate import Samples
from pumice.patterns import Pattern
from pumice.recipe import Recipe

_SEARCHED = 8  # samples that a choice is scored on
_ATTEMPTS = 4  # to keep to a budget and use it up
_SLACK = 0.995  # by which an attempt aims below the budget
_USED_UP = 0.97  # of a budget: what is left is not worth another attempt
_NOTICEABLE = 0.01  # a drop beyond which training is worth its trouble


class Advisor:
    """From the options of layers to advice."""

    def __init__(self, ground: Ground, layers: Layers, space: Space, budget: Budget | None) -> None:
        self._ground, self._layers, self._space, self._budget = ground, layers, space, budget
        self._counts = "size" if (budget and budget.kind == "size") or ground.setting.target.runs_on_gpu else "time"
        self._points: list[Point] = []
        self._remarks: list[str] = []
        with ground.stage("measure the float model and dense int8"):
            self._float_metrics = ground.checker.float_metrics(ground.exact.run)
            self._int8 = self._carry_out("dense int8", "int8", dense_choice(layers.tables))
        self._time = self._time_model()
        self._size = CostModel.of_size(layers.tables, self._int8.outcome.nbytes)
        self._model = self._size if self._counts == "size" else self._time
        self._points[0] = self._int8 = replace(self._int8, expected_ms=self._time.dense / 1e6)

    def advise(self) -> Advice:
        """Search, allocate, carry out. Raises AccuracyBudgetError and PerformanceBudgetError."""
        limit = self._limit()
        with self._ground.stage("what each layer does to the outputs"):
            sensitivities = self._sensitivities(limit)
        problem = Problem(self._model.costs, [np.array([o.error for o in t.options]) for t in self._layers.tables])
        problem = problem.weighted(sensitivities)
        chosen: Point | None = None
        with self._ground.stage("carry out the float model and the frontier"):
            self._carry_out("float32", "float32", self._float_choice())
            choices = self._frontier(problem)
        if self._budget and self._budget.kind == "max-drop":
            with self._ground.stage("revert layers until the drop is within the budget"):
                chosen = self._within_drop(problem, choices)
        elif self._budget:
            with self._ground.stage("carry out the allocation"):
                chosen = self._within_cost(problem, limit)
        if chosen is not None:
            with self._ground.stage("carry out uniform settings that cost as much"):
                self._uniform(chosen)
            chosen = self._best(chosen)
        return self._advice(sensitivities, chosen)

    # Costs

    def _time_model(self) -> CostModel:
        setting, tables = self._ground.setting, self._layers.tables
        sources = sorted({option.source for table in tables for option in table.options})
        self._remarks.append(f"times of layers: {', '.join(sources)}")
        if not setting.is_here:
            self._remarks.append(
                f"{setting.target.name} is not this machine, so nothing was timed: times are sums over the layers, and "
                "what runs between them is not in it"
            )
            return CostModel.of_time(tables)
        times = self._ground.checker.dense_times()
        names = {name for table in tables for name in table.layers}
        inside = sum(taken for name, taken in times.layers.items() if name in names)
        return CostModel.of_time(tables, times.whole, inside)

    def _limit(self) -> float:
        """What a choice may take; without a limit of time or size, halfway between the least and dense."""
        model, budget = self._model, self._budget
        if budget is None or budget.kind == "max-drop":
            return float(np.sqrt(model.least * model.dense))
        if budget.kind == "latency" and not budget.is_relative and not self._ground.setting.is_here:
            self._refuse_cycles()
        limit = budget.limit(model.dense)
        if limit < model.least:
            raise self._unreachable(model.least)
        return limit

    def _refuse_cycles(self) -> None:
        target = self._ground.setting.target
        estimated = any(option.source == ESTIMATED for table in self._layers.tables for option in table.options)
        if estimated and target.architecture != "x86_64":
            raise UsageError(
                f"--latency {self._budget}: times for {target.name} are estimates that compare layers, not "
                "milliseconds; give a share of dense int8, such as 60%, or --tuning-db with times of that device"
            )

    def _unreachable(self, least: float) -> PerformanceBudgetError:
        what = f"{least / 1e6:.3g} ms" if self._counts == "time" else f"{least / 1e3:,.0f} kB"
        share = least / self._model.dense
        return PerformanceBudgetError(
            f"{source_of(self._ground.mod)}: {self._budget} cannot be reached: with every layer at its cheapest option "
            f"it takes {what}, {share:.0%} of dense int8; allow more, or try further patterns and levels"
        )

    # Sensitivities

    def _sensitivities(self, limit: float) -> np.ndarray:
        ground, tables = self._ground, self._layers.tables
        searched = list(Samples(ground.mod, ground.setting.calibration))
        searched = searched[:: max(1, len(searched) // _SEARCHED)][:_SEARCHED]
        reference = Reference(ground.exact.run, searched)

        def noise(choice: Choice) -> float:
            labels = json.dumps([table.options[i].label for table, i in zip(tables, choice, strict=True)])
            run = self._layers.stitcher
            return ground.work.remember(
                lambda: reference.closeness(run.evaluator(choice).run).noise, "noise of a choice", labels
            )

        minutes = ground.effort.minutes
        deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes

        def may_go_on() -> bool:
            return time.monotonic() < deadline

        start = look_at_each(tables, noise, may_go_on, ground.tell)
        problem = Problem(self._model.costs, [np.array([o.error for o in t.options]) for t in tables])
        spare = max(limit - self._model.rest, problem.least)
        found = search(problem, spare, noise, start, ground.effort.trials, may_go_on, ground.tell)
        self._remarks.append(
            f"sensitivities: {len(tables)} layers alone and {found.trials} choices on {len(searched)} samples; the "
            f"search brought the noise at the outputs from {found.scores[0]:.3g} to {found.score:.3g}"
        )
        return found.sensitivities

    # Points

    def _carry_out(self, label: str, kind: str, what: Choice | Recipe, expected: float | None = None) -> Point:
        """Compile and measure; a point that is there already is not made twice."""
        ground = self._ground
        recipe = what if isinstance(what, Recipe) else recipe_of(self._layers.tables, what, ground.base)
        known = next((point for point in self._points if point.recipe == recipe), None)
        if known is not None:
            return known
        outcome = ground.checker.outcome(recipe)
        if not isinstance(what, Recipe) and self._points:  # the first is what the model of time is made of
            expected = self._time.whole(what) / 1e6
        drop = drop_of(outcome, self._float_metrics, self._is_share())
        point = Point(label, kind, recipe, expected, outcome, drop)
        self._points.append(point)
        ground.tell(describe(point))
        return point

    def _float_choice(self) -> Choice:
        return tuple(table.index("float32") for table in self._layers.tables)

    def _frontier(self, problem: Problem) -> list[Choice]:
        """Choices from the cheapest to dense, evenly spread in the logarithm of what they cost, each carried out."""
        model, count = self._model, self._ground.effort.points
        choices: list[Choice] = []
        for limit in np.geomspace(model.least, model.dense, count + 1)[:count]:
            choice = allocate(problem, max(float(limit) - model.rest, problem.least))
            assert choice is not None
            choices.append(choice)
            self._carry_out(f"frontier {len(choices)}", "frontier", choice)
        return choices

    def _within_cost(self, problem: Problem, limit: float) -> Point:
        """The allocation that loses least of those whose libraries keep to the limit.

        What a library takes is not quite what was expected. So the next attempt is allotted more or less by as much as
        the last one was off, until the limit is kept and used up.
        """
        asked, kept, label = limit, [], "allocated"
        for _ in range(_ATTEMPTS):
            choice = allocate(problem, asked - self._model.rest)
            if choice is None:
                break
            point = self._carry_out(label, "allocated", choice)
            taken = self._taken(point)
            if taken <= limit:
                kept.append(point)
                if taken >= _USED_UP * limit:
                    break
            asked *= limit / taken * _SLACK
            label = f"allocated, expected to take {asked / limit:.0%} of the budget"
        if kept:
            return min(kept, key=lambda point: (point.drop, self._taken(point)))
        if choice is None:
            raise self._unreachable(self._model.least * limit / asked)
        raise PerformanceBudgetError(
            f"{source_of(self._ground.mod)}: {self._budget} was allotted, and the library still takes "
            f"{taken / limit:.1%} of that after {_ATTEMPTS} attempts; allow more"
        )

    def _taken(self, point: Point) -> float:
        """Nanoseconds or bytes, as measured where it was."""
        return cost_of(point, self._counts) * (1e6 if self._counts == "time" else 1.0)

    def _within_drop(self, problem: Problem, choices: Sequence[Choice]) -> Point:
        """From the cheapest choice of the frontier that loses too much, layers reverted until it does no more."""
        budget = self._budget
        assert budget is not None

        def holds(choice: Choice, step: int = 0) -> bool:
            return self._carry_out(f"{step} steps reverted", "reverted", choice).drop <= budget.value

        start = next((i for i in reversed(range(len(choices))) if not holds(choices[i])), None)
        if start is None:  # even the cheapest one holds
            return self._carry_out("frontier 1", "frontier", choices[0])
        path = list(reversals(problem, choices[start]))
        if path[-1] != self._float_choice():
            path.append(self._float_choice())
        low, high = 0, len(path) - 1  # the first is known to miss; the last is the most that can be done
        if not holds(path[high], high):
            lost = self._carry_out(f"{high} steps reverted", "reverted", path[high]).drop
            raise AccuracyBudgetError(
                f"{source_of(self._ground.mod)}: --max-drop {budget}: even with every layer dense and in float32 "
                f"{self._drop_unit()} drops by {lost:.3g}; allow more, or see why the base recipe loses that"
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(path[middle], middle) else (middle, high)
        reverted = sum(a != b for a, b in zip(path[0], path[high], strict=True))
        self._remarks.append(f"{reverted} layers were reverted, in {high} steps, from frontier {start + 1}")
        return self._carry_out(f"{high} steps reverted", "reverted", path[high])

    def _uniform(self, chosen: Point) -> None:
        """Every technique and pattern on all layers alike, as much of it as ``chosen`` or the budget needs."""
        budget = self._budget
        assert budget is not None
        limit = self._taken(chosen) if budget.kind == "max-drop" else budget.limit(self._model.dense)
        expected = self._expected(chosen) * limit / self._taken(chosen)
        for technique in self._space.techniques:
            for pattern in self._space.parsed:
                point = self._carry_out_uniform(technique, pattern, expected)
                # Its kernels may be off by more, or less, than those of ``chosen``: once more, by what it took.
                if point is not None and not _USED_UP * limit <= self._taken(point) <= limit:
                    self._carry_out_uniform(technique, pattern, self._expected(point) * limit / self._taken(point))

    def _carry_out_uniform(self, technique: str, pattern: Pattern, limit: float) -> Point | None:
        """With the least amount that is expected to take no more than the limit; None where none does."""
        amount = self._model.uniform_amount(technique, pattern, limit)
        if amount is None:
            self._remarks.append(f"uniform {technique}:{pattern} does not get so far at any level")
            return None
        spec = spec_of(technique, pattern, amount)
        recipe = replace(self._ground.base, prune=(spec,) if amount else ())
        taken = self._time.uniform(technique, pattern, amount) / 1e6
        return self._carry_out(f"uniform {spec}", "uniform", recipe, taken)

    def _expected(self, point: Point) -> float:
        """What the model of costs expects of a point that was allocated."""
        if self._counts == "time" and point.expected_ms is not None:
            return 1e6 * point.expected_ms
        return float(point.outcome.nbytes)

    def _best(self, chosen: Point) -> Point:
        """``chosen``, or what loses less and keeps to the same limits: a uniform setting, or one of the frontier."""
        most, drop = self._taken(chosen), chosen.drop
        budget = self._budget
        assert budget is not None
        if budget.kind == "max-drop":
            allowed = [point for point in self._points if point.drop <= budget.value]
            return min(allowed, key=lambda point: (self._taken(point), point.drop))
        limit = max(most, budget.limit(self._model.dense))
        allowed = [point for point in self._points if self._taken(point) <= limit and point.drop < drop]
        return min([chosen, *allowed], key=lambda point: (point.drop, self._taken(point)))

    # The end

    def _advice(self, sensitivities: np.ndarray, chosen: Point | None) -> Advice:
        ground, layers = self._ground, self._layers
        points = [replace(point, chosen=point is chosen) for point in self._points]
        self._remarks.append(ground.note)
        if chosen is not None and chosen.kind == "uniform":
            self._remarks.append(f"a setting that treats all layers alike came out best: {chosen.label}")
        training = self._training(chosen)
        return Advice(
            source=source_of(ground.mod),
            target=ground.setting.target.name,
            counts=self._counts,
            budget=self._budget,
            drop_unit=self._drop_unit(),
            tables=tuple(layers.tables),
            sensitivities=tuple(map(float, sensitivities)),
            left=layers.left,
            float_metrics=self._float_metrics,
            points=tuple(points),
            remarks=tuple(self._remarks),
            training=training,
        )

    def _training(self, chosen: Point | None) -> tuple[str, ...]:
        """How to train where pruning alone falls short: it loses too much, or had to be taken back."""
        if chosen is None or self._budget is None:
            return ()
        if self._budget.kind != "max-drop":
            return training_lines(chosen.recipe) if chosen.drop > _NOTICEABLE else ()
        missed = [point for point in self._points if point.kind == "frontier" and point.drop > self._budget.value]
        fastest = min(missed, key=self._taken, default=None)
        return training_lines(fastest.recipe) if fastest and self._taken(fastest) < self._taken(chosen) else ()

    def _is_share(self) -> bool:
        """Whether drops are shares of the float model's metric: where the budget is one."""
        return self._budget is not None and self._budget.kind == "max-drop" and self._budget.is_relative

    def _drop_unit(self) -> str:
        if not self._float_metrics:
            return "1 - cosine of the outputs"
        return ("a share of " if self._is_share() else "") + ", ".join(self._float_metrics)


def describe(point: Point) -> str:
    """``frontier 2: 4.1 ms, 812 kB, noise 0.013, drop 0.004``."""
    outcome = point.outcome
    time_ms = outcome.milliseconds if outcome.milliseconds is not None else point.expected_ms
    parts = [] if time_ms is None else [f"{time_ms:.3g} ms"]
    parts += [f"{outcome.nbytes / 1e3:,.0f} kB", f"noise {outcome.noise:.3g}", f"cosine {outcome.cosine:.4f}"]
    parts += [f"{name} {value:.4g}" for name, value in outcome.metrics.items()]
    return f"{point.label}: {', '.join(parts)}"
