"""The report's section on what else the model could have been compiled to: the advisor's points and their frontier."""

from __future__ import annotations

from collections.abc import Sequence

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


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that none is at least as fast as and better than, the fastest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.latency_ms, -quality(points, point))):
        if not best or quality(points, point) > quality(points, best[-1]):
            best.append(point)
    return best


def quality(points: Sequence[Point], point: Point) -> float:
    """Higher is better: the metric, where all have one, else the error, turned around."""
    if all(other.metric is not None for other in points):
        return point.metric or 0.0
    return -point.error if point.error is not None else -float("inf")


def _plot(points: Sequence[Point]) -> list[Markup]:
    by_metric = all(point.metric is not None for point in points)
    shown = [point for point in points if by_metric or point.error is not None]
    if not shown:
        return [element("p", "The file says nothing of accuracy or error.", class_="quiet")]
    on_line = frontier(shown)

    def height(point: Point) -> float:
        return (point.metric if by_metric else point.error) or 0.0

    numbers = {id(point): str(index) for index, point in enumerate(points, start=1)}
    dots = [
        Dot(
            point.latency_ms,
            height(point),
            f"{clean(point.label)}: {point.latency_ms:.3g} ms, {height(point):.4g}",
            "chosen" if point.chosen else "sparse" if point in on_line else "between",
            0.1 if point.chosen else 0.0,
            numbers[id(point)] if point.chosen or point in on_line else "",
        )
        for point in shown
    ]
    error = Axis("error (noise over signal): lower is better", from_zero=True)
    up = Axis("metric: higher is better") if by_metric else error
    line = [(point.latency_ms, height(point)) for point in on_line]
    kinds = {"chosen": "chosen", "sparse": "best at its time", "between": "beaten by another"}
    return [legend(kinds), scatter_plot(dots, Axis("ms for one inference"), up, "Quality against time", line)]


def _table(points: Sequence[Point]) -> Markup:
    headings = [("#", True), ("setting", False), ("ms", True), ("size", True), ("error", True), ("metric", True)]
    rows = [
        element(
            "tr",
            number_cell(str(index), index),
            element("td", shorten(clean(point.label), 80), " (chosen)" if point.chosen else None, class_="name"),
            number_cell(f"{point.latency_ms:.3g}", point.latency_ms),
            number_cell("" if point.bytes is None else format_bytes(point.bytes), point.bytes),
            number_cell("" if point.error is None else f"{point.error:.3g}", point.error),
            number_cell("" if point.metric is None else f"{point.metric:.4g}", point.metric),
            class_="chosen" if point.chosen else None,
        )
        for index, point in enumerate(points, start=1)
    ]
    return sortable_table(headings, rows)
