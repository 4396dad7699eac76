"""From the options of layers to advice: sensitivities, allocations, and what comes of each when it is carried out."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace

import numpy as np

from pumice.advisor.advice import Advice, Point
from pumice.advisor.allocation import Choice, Problem
from pumice.advisor.budget import Budget
from pumice.advisor.layer_options import ESTIMATED
from pumice.advisor.ledger import Ledger
from pumice.advisor.removals import possible_ladders
from pumice.advisor.sensitivities import look_at_each, search
from pumice.advisor.start import Start, carry_out_dense, dense_layers
from pumice.advisor.stitching import Reference
from pumice.advisor.subjects import Space
from pumice.advisor.survey import Ground, find_layer_options
from pumice.advisor.training import training_lines
from pumice.advisor.uniform import UniformSettings
from pumice.errors import AccuracyBudgetError, PerformanceBudgetError, UsageError
from pumice.module import source_of, weights_of
from pumice.passes.calibrate import Samples
from pumice.passes.prune_spec import PruneSpec

_SEARCHED = 8  # samples that a choice is scored on
_NOTICEABLE = 0.01  # a drop beyond which training is worth its trouble
_NOISE = 0.01  # of a time that was measured


@dataclass(frozen=True, eq=False)
class _Reached:
    """The best point that was reached from a start."""

    start: Start
    point: Point


class Advisor:
    """From the options of layers to advice."""

    def __init__(self, ground: Ground, space: Space, budget: Budget | None, measure: bool) -> None:
        """Find the options of the layers, measure the float model and dense int8.

        Raises UsageError where a removal names a layer that is not there.
        """
        self._ground, self._space, self._budget = ground, space, budget
        self._ladders = possible_ladders(ground.mod, space.removals) if budget else {}
        self._remarks: list[str] = []
        self._starts: dict[tuple[PruneSpec, ...], Start] = {}
        self._failure: PerformanceBudgetError | None = None
        layers = find_layer_options(ground, space, measure)
        with ground.stage("measure the float model"):
            self._ledger = Ledger(ground, budget)
        self._whole = self._starts[()] = Start(ground, self._ledger, layers)

    def advise(self) -> Advice:
        """Search, allocate, carry out. Raises AccuracyBudgetError and PerformanceBudgetError."""
        limit, ground = self._limit(), self._ground
        with ground.stage("what each layer does to the outputs"):
            self._sensitivities = self._search(limit)
        with ground.stage("carry out the float model and the frontier"):
            self._whole.carry_out("float32", "float32", self._whole.float_choice())
            choices = self._whole.frontier(self._whole.problem(self._sensitivities))
        if self._budget is None:
            return self._advice(None)
        best = self._walk(limit, choices)
        self._remarks += best.start.remarks
        self._carry_out_uniform(best.point)
        return self._advice(self._best(best.point))

    # Limits

    def _limit(self) -> float:
        """What a choice may take; without a limit of time or size, halfway between the least and dense."""
        costs, budget = self._whole.costs, self._budget
        self._note_times()
        if budget is None or budget.kind == "max-drop":
            return float(np.sqrt(costs.least * costs.dense))
        if budget.kind == "latency" and not budget.is_relative and not self._ground.setting.is_here:
            self._refuse_cycles()
        limit = budget.limit(costs.dense)
        if limit < costs.least:
            self._check_smallest(limit)
        return limit

    def _check_smallest(self, limit: float) -> None:
        """Raise PerformanceBudgetError, before the search, where not even all removals together would keep to it."""
        smallest = tuple(ladder[-1] for ladder in self._ladders.values())
        start = self._start(self._ground.smaller(smallest), self._space) if smallest else self._whole
        if start.costs.least > limit:
            raise start.unreachable(start.costs.least)

    def _note_times(self) -> None:
        sources = {option.source for table in self._whole.layers.tables for option in table.options}
        self._remarks.append(f"times of layers: {', '.join(sorted(sources))}")
        target = self._ground.setting.target.name
        if not self._ground.setting.is_here:
            self._remarks.append(
                f"{target} is not this machine, so nothing was timed: times are sums over the layers, and what runs "
                "between them is not in it"
            )

    def _refuse_cycles(self) -> None:
        target, tables = self._ground.setting.target, self._whole.layers.tables
        estimated = any(option.source == ESTIMATED for table in tables for option in table.options)
        if estimated and target.architecture != "x86_64":
            raise UsageError(
                f"--latency {self._budget}: times for {target.name} are estimates that compare layers, not "
                "milliseconds; give a share of dense int8, such as 60%, or --tuning-db with times of that device"
            )

    # Sensitivities

    def _search(self, limit: float) -> dict[str, float]:
        """The sensitivity of each layer of the whole network, by name."""
        ground, costs, layers = self._ground, self._whole.costs, self._whole.layers
        tables = layers.tables
        searched = list(Samples(ground.mod, ground.setting.calibration))
        searched = searched[:: max(1, len(searched) // _SEARCHED)][:_SEARCHED]
        reference = Reference(ground.exact.run, searched)

        def noise(choice: Choice) -> float:
            labels = json.dumps([table.options[i].label for table, i in zip(tables, choice, strict=True)])
            return ground.work.remember(
                lambda: reference.closeness(layers.stitcher.evaluator(choice).run).noise, "noise of a choice", labels
            )

        minutes = ground.effort.minutes
        deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes

        def may_go_on() -> bool:
            return time.monotonic() < deadline

        start = look_at_each(tables, noise, may_go_on, ground.tell)
        problem = Problem(costs.costs, [np.array([o.error for o in t.options]) for t in tables])
        spare = max(limit - costs.rest, problem.least)
        found = search(problem, spare, noise, start, ground.effort.trials, may_go_on, ground.tell)
        self._remarks.append(
            f"sensitivities: {len(tables)} layers alone and {found.trials} choices on {len(searched)} samples; the "
            f"search brought the noise at the outputs from {found.scores[0]:.3g} to {found.score:.3g}"
        )
        return {table.name: float(s) for table, s in zip(tables, found.sensitivities, strict=True)}

    # Removals

    def _walk(self, limit: float, choices: list[Choice]) -> _Reached:
        """From the whole network on, ever more is removed, one method after the other, while that is worth it.

        Raises what ``Start.within_cost`` and ``within_drop`` do where nothing keeps to the budget.
        """
        best = self._reached(self._whole, limit, choices)
        ground = self._ground
        for ladder in self._ladders.values():
            last = ground
            for spec in ladder:
                smaller = ground.smaller([spec])
                if _shapes(smaller) == _shapes(last):
                    continue  # the layers are too small for such a share of them
                last = smaller
                if best is not None and not self._is_promising(smaller.base.removals, best):
                    break
                found = self._reached(self._start(smaller, self._narrow(best)), limit)
                if best is not None and (found is None or not self._is_better(found.point, best.point)):
                    break
                best = found
            # As long as nothing keeps to the budget, all is taken out that can be.
            ground = best.start.ground if best else last
        if best is None:
            assert self._failure is not None
            raise self._failure
        return best

    def _start(self, smaller: Ground, space: Space) -> Start:
        """What is left without some filters and heads. Kernels are measured of the whole network alone: what is added
        to a tuning database in between would make what was compiled before another thing."""
        start = Start(smaller, self._ledger, find_layer_options(smaller, space, measure=False))
        self._starts[smaller.base.removals] = start
        return start

    def _is_promising(self, removals: tuple[PruneSpec, ...], best: _Reached) -> bool:
        """Whether the removals alone lose less than what was found: zeros in what is left only lose more.

        What int8 loses does not count, as layers may stay float.
        """
        budget = self._budget
        assert budget is not None
        dense = carry_out_dense(self._ground, self._ledger, removals)
        loses = dense.drop - max(0.0, self._whole.dense.drop)
        if loses <= (budget.value if budget.kind == "max-drop" else best.point.drop):
            return True
        names = " and ".join(map(str, removals))
        self._remarks.append(
            f"{names} alone loses {loses:.2g} more than int8, so what zeros would add was not looked at"
        )
        return False

    def _narrow(self, best: _Reached | None) -> Space:
        """The techniques and patterns that were chosen so far: what is beaten in one network is in a smaller one."""
        specs = () if best is None else best.point.recipe.prune
        used = [(spec.method, str(pattern)) for spec in specs if (pattern := getattr(spec, "pattern", None))]
        if not used:
            return self._space
        techniques, patterns = (tuple(dict.fromkeys(names)) for names in zip(*used, strict=True))
        return replace(self._space, techniques=techniques, patterns=patterns)

    def _reached(self, start: Start, limit: float, choices: list[Choice] | None = None) -> _Reached | None:
        """The best within the budget from one start, whose frontier is ``choices`` where it is known; None without any.

        Raises AccuracyBudgetError where even the whole network, all reverted, loses too much.
        """
        budget, problem = self._budget, start.problem(self._sensitivities)
        assert budget is not None
        names = "".join(f"{spec}, " for spec in start.ground.base.removals)
        if budget.kind != "max-drop":
            with self._ground.stage(f"{names}carry out the allocation"):
                try:
                    return _Reached(start, start.within_cost(problem, limit))
                except PerformanceBudgetError as error:
                    self._failure = error
                    return None
        with self._ground.stage(f"{names}revert layers until the drop is within the budget"):
            try:
                return _Reached(start, start.within_drop(problem, choices or start.frontier(problem)))
            except AccuracyBudgetError:
                if start is self._whole:
                    raise
                return None

    def _is_better(self, point: Point, best: Point) -> bool:
        """Whether it is worth having less of the network: for what could be noise of timing it is not."""
        assert self._budget is not None
        if self._budget.kind == "max-drop":
            return self._ledger.taken(point) < (1 - _NOISE) * self._ledger.taken(best)
        return point.drop < best.drop

    def _key(self, point: Point) -> tuple[float, float]:
        """What is least in the best of the points that keep to the budget."""
        assert self._budget is not None
        key = (self._ledger.taken(point), point.drop)
        return key if self._budget.kind == "max-drop" else (key[1], key[0])

    # The end

    def _carry_out_uniform(self, best: Point) -> None:
        """As much of each as the budget allows, or as the best point takes."""
        budget, taken, whole = self._budget, self._ledger.taken, self._whole
        assert budget is not None
        limit = taken(best) if budget.kind == "max-drop" else budget.limit(whole.costs.dense)
        removals = [ladder[0] for ladder in self._ladders.values()]
        settings = UniformSettings(whole, self._ledger, self._space, removals)
        settings.carry_out(limit, limit * whole.costs.dense / taken(whole.dense))
        self._remarks += settings.remarks

    def _best(self, chosen: Point) -> Point:
        """``chosen``, or what is better and keeps to the same limits: a uniform setting, or one of the frontier."""
        budget, taken = self._budget, self._ledger.taken
        assert budget is not None
        if budget.kind == "max-drop":
            allowed = [point for point in self._ledger.points if point.drop <= budget.value]
        else:
            limit = max(taken(chosen), budget.limit(self._whole.costs.dense))
            allowed = [point for point in self._ledger.points if taken(point) <= limit]
        return min([chosen, *allowed], key=self._key)

    def _advice(self, chosen: Point | None) -> Advice:
        ground, ledger = self._ground, self._ledger
        removals = () if chosen is None else chosen.recipe.removals
        start = self._starts.get(removals)
        layers = start.layers if start else dense_layers(ground, removals)
        points = [replace(point, chosen=point is chosen) for point in ledger.points]
        self._remarks.append(ground.note)
        if removals:
            self._remarks.append(
                f"{' and '.join(map(str, removals))} first: the options above are those of what is left, and the "
                "sensitivities those of the whole network"
            )
        if chosen is not None and chosen.kind == "uniform":
            self._remarks.append(f"a setting that treats all layers alike came out best: {chosen.label}")
        return Advice(
            source=source_of(ground.mod),
            target=ground.setting.target.name,
            counts=ledger.counts,
            budget=self._budget,
            drop_unit=ledger.drop_unit,
            tables=tuple(layers.tables),
            sensitivities=tuple(self._sensitivities.get(table.name, 1.0) for table in layers.tables),
            left=layers.left,
            float_metrics=ledger.metrics,
            points=tuple(points),
            remarks=tuple(self._remarks),
            training=self._training(chosen),
        )

    def _training(self, chosen: Point | None) -> tuple[str, ...]:
        """How to train where pruning alone falls short: it loses too much, or had to be taken back.

        What is trained is the whole network: a recipe that removes nothing.
        """
        if chosen is None or self._budget is None:
            return ()
        whole = [point for point in self._ledger.points if point.recipe.prune and not point.recipe.removals]
        if self._budget.kind != "max-drop":
            limit = self._budget.limit(self._whole.costs.dense)
            kept = [point for point in whole if self._ledger.taken(point) <= limit]
            best = min(kept, key=self._key, default=None)
            return training_lines(best.recipe) if best and chosen.drop > _NOTICEABLE else ()
        missed = [point for point in whole if point.kind == "frontier" and point.drop > self._budget.value]
        fastest = min(missed, key=self._ledger.taken, default=None)
        is_faster = fastest is not None and self._ledger.taken(fastest) < self._ledger.taken(chosen)
        return training_lines(fastest.recipe) if fastest is not None and is_faster else ()


def _shapes(ground: Ground) -> list[tuple[int, ...]]:
    return [array.shape for array in weights_of(ground.mod).values()]
