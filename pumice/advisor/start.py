"""A network that options are allocated on: the model as it is, or what is left of it without some filters or heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pumice.advisor.advice import Point, cost_of
from pumice.advisor.allocation import Choice, Problem, allocate, reversals
from pumice.advisor.cost_model import CostModel
from pumice.advisor.ledger import Ledger
from pumice.advisor.stitching import recipe_of
from pumice.advisor.subjects import Space
from pumice.advisor.survey import Ground, Layers, find_layer_options
from pumice.errors import AccuracyBudgetError, PerformanceBudgetError
from pumice.module import source_of
from pumice.passes.prune_spec import PruneSpec

_ATTEMPTS = 4  # to keep to a budget and use it up
_SLACK = 0.995  # by which an attempt aims below the budget
USED_UP = 0.97  # of a budget: what is left is not worth another attempt


class Start:
    """A network, the options of its layers, and what they cost.

    dense: the network with all of its layers dense and in int8, carried out
    layers: with their options; time, size: the models of costs, of which ``costs`` is the one that is budgeted
    remarks: on how a point came about
    """

    def __init__(self, ground: Ground, ledger: Ledger, layers: Layers) -> None:
        """Time and measure the dense network. Raises what ``Checker`` does."""
        self.ground, self.layers, self._ledger = ground, layers, ledger
        self.remarks: list[str] = []
        expected = None if ground.setting.is_here else CostModel.of_time(layers.tables).dense / 1e6
        self.dense = carry_out_dense(ground, ledger, ground.base.prune, expected)
        self.time = _time_model(ground, layers, self.dense)
        self.size = CostModel.of_size(layers.tables, self.dense.outcome.nbytes)
        self.costs = self.size if ledger.counts == "size" else self.time

    def problem(self, sensitivities: Mapping[str, float]) -> Problem:
        """What is allocated. A layer whose sensitivity is not known has the median of the others."""
        tables = self.layers.tables
        median = float(np.median(list(sensitivities.values()))) if sensitivities else 1.0
        plain = Problem(self.costs.costs, [np.array([o.error for o in table.options]) for table in tables])
        return plain.weighted(np.array([sensitivities.get(table.name, median) for table in tables]))

    def carry_out(self, label: str, kind: str, choice: Choice) -> Point:
        """Compile and measure the options that were chosen."""
        recipe = recipe_of(self.layers.tables, choice, self.ground.base)
        label = ", ".join([*map(str, self.ground.base.prune), label])
        return self._ledger.carry_out(label, kind, recipe, self.time.whole(choice) / 1e6)

    def float_choice(self) -> Choice:
        """Every layer dense and in float32."""
        return tuple(table.index("float32") for table in self.layers.tables)

    def frontier(self, problem: Problem) -> list[Choice]:
        """Choices from the cheapest to dense, evenly spread in the logarithm of what they cost, each carried out."""
        costs, count = self.costs, self.ground.effort.points
        choices: list[Choice] = []
        for limit in np.geomspace(costs.least, costs.dense, count + 1)[:count]:
            choice = allocate(problem, max(float(limit) - costs.rest, problem.least))
            assert choice is not None
            choices.append(choice)
            self.carry_out(f"frontier {len(choices)}", "frontier", choice)
        return choices

    def within_cost(self, problem: Problem, limit: float) -> Point:
        """The allocation that loses least of those whose libraries keep to the limit.

        What a library takes is not quite what was expected. So the next attempt is allotted more or less by as much as
        the last one was off, until the limit is kept and used up. Raises PerformanceBudgetError where none keeps to it.
        """
        asked, kept, label = limit, [], "allocated"
        for _ in range(_ATTEMPTS):
            choice = allocate(problem, asked - self.costs.rest)
            if choice is None:
                break
            point = self.carry_out(label, "allocated", choice)
            taken = self._ledger.taken(point)
            if taken <= limit:
                kept.append(point)
                if taken >= USED_UP * limit:
                    break
            asked *= limit / taken * _SLACK
            label = f"allocated, expected to take {asked / limit:.0%} of the budget"
        if kept:
            return min(kept, key=lambda point: (point.drop, self._ledger.taken(point)))
        if choice is None:
            raise self.unreachable(self.costs.least * limit / asked)
        raise PerformanceBudgetError(
            f"{source_of(self.ground.mod)}: {self._ledger.budget} was allotted, and the library still takes "
            f"{taken / limit:.1%} of that after {_ATTEMPTS} attempts; allow more"
        )

    def within_drop(self, problem: Problem, choices: Sequence[Choice]) -> Point:
        """From the cheapest choice of the frontier that loses too much, layers reverted until it does no more.

        Raises AccuracyBudgetError where even everything reverted loses too much.
        """
        budget = self._ledger.budget
        assert budget is not None

        def holds(choice: Choice, step: int = 0) -> bool:
            return self.carry_out(f"{step} steps reverted", "reverted", choice).drop <= budget.value

        start = next((i for i in reversed(range(len(choices))) if not holds(choices[i])), None)
        if start is None:  # even the cheapest one holds
            return self.carry_out("frontier 1", "frontier", choices[0])
        path = list(reversals(problem, choices[start]))
        if path[-1] != self.float_choice():
            path.append(self.float_choice())
        low, high = 0, len(path) - 1  # the first is known to miss; the last is the most that can be done
        if not holds(path[high], high):
            lost = self.carry_out(f"{high} steps reverted", "reverted", path[high]).drop
            raise AccuracyBudgetError(
                f"{source_of(self.ground.mod)}: --max-drop {budget}: even with every layer dense and in float32 "
                f"{self._ledger.drop_unit} drops by {lost:.3g}; allow more, or see why the base recipe loses that"
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(path[middle], middle) else (middle, high)
        reverted = sum(a != b for a, b in zip(path[0], path[high], strict=True))
        self.remarks.append(f"{reverted} layers were reverted, in {high} steps, from frontier {start + 1}")
        return self.carry_out(f"{high} steps reverted", "reverted", path[high])

    def unreachable(self, least: float) -> PerformanceBudgetError:
        """The error that says how little it can take, nanoseconds or bytes."""
        ledger, removals = self._ledger, self.ground.base.prune
        what = f"{least / 1e6:.3g} ms" if ledger.counts == "time" else f"{least / 1e3:,.0f} kB"
        first = "".join(f"{spec}, then " for spec in removals)
        return PerformanceBudgetError(
            f"{source_of(self.ground.mod)}: {ledger.budget} cannot be reached: with {first}every layer at its cheapest "
            f"option it takes {what}, {least / ledger.taken(ledger.points[0]):.0%} of dense int8; allow more, or try "
            "further patterns, levels and removals"
        )


def carry_out_dense(
    whole: Ground, ledger: Ledger, removals: tuple[PruneSpec, ...] = (), expected_ms: float | None = None
) -> Point:
    """What is left of the network without these filters and heads, all of it dense and in int8: a uniform setting.

    Of a target that is not here the time is the sum of the layers, which is asked for where it is not given.
    """
    recipe = whole.base.pruning(removals)
    known = ledger.find(recipe)
    if known is not None:
        return known
    if expected_ms is None and ledger.counts == "time" and not whole.setting.is_here:
        expected_ms = CostModel.of_time(dense_layers(whole, removals).tables).dense / 1e6
    label, kind = (" + ".join(map(str, removals)), "uniform") if removals else ("dense int8", "int8")
    with whole.stage(f"carry out {label}"):
        return ledger.carry_out(label, kind, recipe, expected_ms)


def dense_layers(whole: Ground, removals: tuple[PruneSpec, ...]) -> Layers:
    """The layers of what is left, with no option but dense ones."""
    return find_layer_options(whole.smaller(removals), Space(techniques=()), measure=False)


def _time_model(ground: Ground, layers: Layers, dense: Point) -> CostModel:
    """By the profile of the dense network, as a share of what it takes in turns with the whole one: see ``Checker``."""
    if not ground.setting.is_here:
        return CostModel.of_time(layers.tables)
    times, taken = ground.checker.dense_times(dense.recipe), 1e6 * cost_of(dense, "time")
    names = {name for table in layers.tables for name in table.layers}
    inside = sum(nanoseconds for name, nanoseconds in times.layers.items() if name in names)
    return CostModel.of_time(layers.tables, taken, inside * taken / times.whole)
