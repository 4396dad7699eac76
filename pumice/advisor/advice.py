"""What an advisor found: the options of each layer, points of accuracy against time and size, and the one to take."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from pumice.advisor.budget import Budget
from pumice.advisor.end_to_end import Outcome
from pumice.advisor.layer_options import LayerTable
from pumice.recipe import Recipe


@dataclass(frozen=True)
class Point:
    """One way to compile the model, carried out.

    kind: float32 and int8 (nothing pruned), frontier, allocated, uniform (all layers alike), reverted (of --max-drop)
    expected_ms: of one call, by the sum of the layers; None where they cannot be summed
    drop: of the metric against the float model, the worst of several; without a metric, 1 - cosine of the outputs
    """

    label: str
    kind: str
    recipe: Recipe
    expected_ms: float | None
    outcome: Outcome
    drop: float
    chosen: bool = False


@dataclass(frozen=True)
class Advice:
    """All of it.

    counts: what was spent: time or size
    drop_unit: what a drop is in: the metric's name, or how outputs were compared
    tables: the options of each weight, of what the chosen recipe leaves of the network; sensitivities: what its error
        counts for in the network's
    left: why other layers were left as they are
    float_metrics: the user's metric of the float model
    training: lines of Python that train in what pruning alone cannot do; none where that is not called for
    """

    source: str
    target: str
    counts: str
    budget: Budget | None
    drop_unit: str
    tables: tuple[LayerTable, ...]
    sensitivities: tuple[float, ...]
    left: dict[str, str]
    float_metrics: dict[str, float]
    points: tuple[Point, ...]
    remarks: tuple[str, ...] = ()
    training: tuple[str, ...] = ()

    @property
    def chosen(self) -> Point | None:
        """The point that the recipe is of."""
        return next((point for point in self.points if point.chosen), None)

    def chosen_options(self) -> dict[str, str]:
        """By layer name, the label of the option that the chosen recipe gives it; empty where nothing was chosen."""
        point = self.chosen
        if point is None:
            return {}
        found = {}
        for table in self.tables:
            name, weight = table.name, table.weight
            spec = next((spec for spec in point.recipe.zeroing if spec.keeps(name, weight) is None), None)
            is_float = any(fnmatchcase(name, glob) for glob in point.recipe.keep_float)
            text = "" if spec is None else str(replace(spec, only=(), keep=()))
            dtype = "float32" if is_float else "int8"
            found[name] = text if text and not is_float else f"{text} {dtype}".strip()
        return found

    def to_json(self) -> dict[str, Any]:
        """As advice.json: ``points`` with label, latency_ms, bytes, error, metric and chosen, and ``layers``."""
        return {
            "source": self.source,
            "target": self.target,
            "budget": None if self.budget is None else {"kind": self.budget.kind, "limit": str(self.budget)},
            "float_metrics": self.float_metrics,
            "points": [_point_json(point) for point in self.points],
            "layers": [
                {
                    "name": table.name,
                    "layers": list(table.layers),
                    "sensitivity": sensitivity,
                    "chosen": self.chosen_options().get(table.name),
                    "options": [
                        {"label": option.label, "error": option.error, **asdict(option)} for option in table.options
                    ],
                }
                for table, sensitivity in zip(self.tables, self.sensitivities, strict=True)
            ],
            "left": self.left,
            "remarks": list(self.remarks),
            "training": list(self.training),
        }


def drop_of(outcome: Outcome, float_metrics: dict[str, float], is_relative: bool) -> float:
    """What is lost against the float model: the worst of the metrics, or 1 - cosine where there are none.

    ``is_relative``: as a share of the float model's metric.
    """
    if not float_metrics:
        return 1 - outcome.cosine
    drops = []
    for name, before in float_metrics.items():
        lost = before - outcome.metrics[name]
        drops.append(lost / abs(before) if is_relative and before else lost)
    return max(drops)


def front(points: tuple[Point, ...], counts: str) -> list[Point]:
    """Those that no other beats at both cost and drop, the cheapest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (cost_of(point, counts), point.drop)):
        if not best or point.drop < best[-1].drop:
            best.append(point)
    return best


def cost_of(point: Point, counts: str) -> float:
    """Milliseconds, as measured or else as expected; or bytes. What neither is known of costs without end."""
    if counts == "size":
        return float(point.outcome.nbytes)
    if point.outcome.milliseconds is not None:
        return point.outcome.milliseconds
    return float("inf") if point.expected_ms is None else point.expected_ms


def _point_json(point: Point) -> dict[str, Any]:
    outcome = point.outcome
    is_measured = outcome.milliseconds is not None
    return {
        "label": point.label,
        "kind": point.kind,
        "latency_ms": outcome.milliseconds if is_measured else point.expected_ms,
        "latency_source": "measured" if is_measured else "sum of layers",
        "bytes": outcome.nbytes,
        "error": outcome.noise,
        "cosine": outcome.cosine,
        "metric": next(iter(outcome.metrics.values()), None),
        "metrics": outcome.metrics,
        "drop": point.drop,
        "chosen": point.chosen,
        "recipe": point.recipe.to_json(),
    }
