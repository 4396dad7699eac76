"""The report's section on what else the model could have been compiled to: the advisor's points and their frontier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pumice.loader import clean
from pumice.report.charts import Axis, Dot, legend, scatter_plot
from pumice.report.data import Point, Report
from pumice.report.markup import Markup, element, number_cell, sortable_table
from pumice.report_table import format_bytes, shorten


def frontier_section(report: Report) -> Markup:
    """Accuracy (or error) against time, and the points as a table."""
    title = element("h2", "What other settings would give")
    if not report.points:
        how = (
            "No other settings were compared: `pumice advise` does, and `pumice report --advice advice.json` shows "
            "here what it found."
        )
        return element("section", title, element("p", how, class_="quiet"), id="frontier")
    explained = (
        "Each point is one way to compile this model. The line joins those that no other beats in both time and "
        "quality; what lies off it is dominated."
    )
    return element(
        "section",
        title,
        element("p", explained, class_="quiet"),
        element("div", element("figure", *_plot(report.points)), _table(report.points), class_="charts"),
        id="frontier",
    )


@dataclass(frozen=True)
class Place:
    """Where a point is drawn: its number in the table, its time, its height, and the height so that more is better."""

    point: Point
    number: int
    milliseconds: float
    height: float
    quality: float


def frontier(places: Sequence[Place]) -> list[Place]:
    """The places that none is at least as fast as and better than, the fastest first."""
    best: list[Place] = []
    for place in sorted(places, key=lambda place: (place.milliseconds, -place.quality)):
        if not best or place.quality > best[-1].quality:
            best.append(place)
    return best


def have_metric(points: Sequence[Point]) -> bool:
    """Whether all were measured by the user's metric."""
    return all(point.metric is not None for point in points)


def places_of(points: Sequence[Point]) -> list[Place]:
    """The points that can be drawn: by the metric, where all have one, else by the error."""
    by_metric, places = have_metric(points), []
    for number, point in enumerate(points, start=1):
        height = point.metric if by_metric else point.error
        if height is not None and point.latency_ms is not None:
            places.append(Place(point, number, point.latency_ms, height, height if by_metric else -height))
    return places


def _plot(points: Sequence[Point]) -> list[Markup]:
    places = places_of(points)
    if not places:
        return [element("p", "No point has both a time and a metric or an error.", class_="quiet")]
    on_line = frontier(places)
    dots = [
        Dot(
            place.milliseconds,
            place.height,
            f"{clean(place.point.label)}: {place.milliseconds:.3g} ms, {place.height:.4g}",
            "chosen" if place.point.chosen else "sparse" if place in on_line else "between",
            0.1 if place.point.chosen else 0.0,
            str(place.number) if place.point.chosen or place in on_line else "",
        )
        for place in sorted(places, key=lambda place: not place.point.chosen)  # whose number is written first
    ]
    error = Axis("error (noise over signal): lower is better", from_zero=True)
    up = Axis("metric: higher is better") if have_metric(points) else error
    is_logarithmic = min(place.milliseconds for place in places) > 0  # float32 may take many times as long
    across = Axis(f"ms for one inference{' (logarithmic)' * is_logarithmic}", is_logarithmic=is_logarithmic)
    line = [(place.milliseconds, place.height) for place in on_line]
    kinds = {"chosen": "chosen", "sparse": "best at its time", "between": "beaten by another"}
    return [legend(kinds), scatter_plot(dots, across, up, "Quality against time", line)]


def _table(points: Sequence[Point]) -> Markup:
    headings = [("#", True), ("setting", False), ("ms", True), ("size", True), ("error", True), ("metric", True)]
    rows = [
        element(
            "tr",
            number_cell(str(index), index),
            element("td", shorten(clean(point.label), 80), " (chosen)" if point.chosen else None, class_="name"),
            number_cell("" if point.latency_ms is None else f"{point.latency_ms:.3g}", point.latency_ms),
            number_cell("" if point.bytes is None else format_bytes(point.bytes), point.bytes),
            number_cell("" if point.error is None else f"{point.error:.3g}", point.error),
            number_cell("" if point.metric is None else f"{point.metric:.4g}", point.metric),
            class_="chosen" if point.chosen else None,
        )
        for index, point in enumerate(points, start=1)
    ]
    return sortable_table(headings, rows)
