"""The points that a run of the advisor has carried out, and what each is measured by."""

from __future__ import annotations

from pumice.advisor.advice import Point, cost_of, drop_of
from pumice.advisor.budget import Budget
from pumice.advisor.survey import Ground
from pumice.recipe import Recipe


class Ledger:
    """Carries recipes out, each once.

    counts: what is spent, time or size; budget: what may be; metrics: the user's, of the float model
    """

    def __init__(self, ground: Ground, budget: Budget | None) -> None:
        """Runs the user's metric on the float model. Raises UsageError from it."""
        on_gpu = ground.setting.target.runs_on_gpu
        self.counts = "size" if (budget and budget.kind == "size") or on_gpu else "time"
        self.budget = budget
        self.points: list[Point] = []
        self.metrics = ground.checker.float_metrics(ground.exact.run)
        self._checker, self._tell = ground.checker, ground.tell

    def carry_out(self, label: str, kind: str, recipe: Recipe, expected_ms: float | None = None) -> Point:
        """Compile and measure; none is made twice. Raises what ``Checker.outcome`` does."""
        known = self.find(recipe)
        if known is not None:
            return known
        outcome = self._checker.outcome(recipe)
        drop = drop_of(outcome, self.metrics, self.drops_are_shares)
        point = Point(label, kind, recipe, expected_ms, outcome, drop)
        self.points.append(point)
        self._tell(describe(point))
        return point

    def find(self, recipe: Recipe) -> Point | None:
        """The point of a recipe that was carried out."""
        return next((point for point in self.points if point.recipe == recipe), None)

    def taken(self, point: Point) -> float:
        """Nanoseconds or bytes, as measured where it was."""
        return cost_of(point, self.counts) * (1e6 if self.counts == "time" else 1.0)

    @property
    def drops_are_shares(self) -> bool:
        """Whether drops are shares of the float model's metric: where the budget is one."""
        return self.budget is not None and self.budget.kind == "max-drop" and self.budget.is_relative

    @property
    def drop_unit(self) -> str:
        """What a drop is in."""
        if not self.metrics:
            return "1 - cosine of the outputs"
        return ("a share of " if self.drops_are_shares else "") + ", ".join(self.metrics)


def describe(point: Point) -> str:
    """``frontier 2: 4.1 ms, 812 kB, noise 0.013, drop 0.004``."""
    outcome = point.outcome
    time_ms = outcome.milliseconds if outcome.milliseconds is not None else point.expected_ms
    parts = [] if time_ms is None else [f"{time_ms:.3g} ms"]
    parts += [f"{outcome.nbytes / 1e3:,.0f} kB", f"noise {outcome.noise:.3g}", f"cosine {outcome.cosine:.4f}"]
    parts += [f"{name} {value:.4g}" for name, value in outcome.metrics.items()]
    return f"{point.label}: {', '.join(parts)}"
