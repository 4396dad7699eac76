"""The report's section on time: the slowest kernel calls, speed against sparsity, time by kind."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from pumice.loader import clean
from pumice.profile import Profile, StepTime
from pumice.record import LayerRecord
from pumice.report.charts import Axis, Bar, Dot, bar_chart, legend, scatter_plot
from pumice.report.data import Report
from pumice.report.formats import KINDS, layer_kind, microseconds
from pumice.report.markup import Markup, element, number_cell, sortable_table

_LONGEST = 20  # bars of the chart
_NAMED = 5  # layers that the plot gives the number of


def time_section(report: Report) -> Markup:
    """The slowest steps as bars, and speed against sparsity."""
    title, profile = element("h2", "Where the time goes"), report.profile
    if profile is None:
        return element("section", title, element("p", report.remarks["time"], class_="quiet"), id="time")
    kinds = {layer.name: layer_kind(layer) for layer in report.layers}
    steps = sorted(profile.steps, key=lambda step: -step.median_us)
    bars = [
        Bar(
            step.name if step.is_layer else f"{step.kernel} (between layers)",
            f"{microseconds(step.median_us)}, {100 * step.share:.1f} %",
            {kinds[step.name] if step.is_layer else "between": step.median_us},
        )
        for step in steps[:_LONGEST]
    ]
    caption = f"Each of the {len(steps)} kernel calls, timed alone on {report.place}. {_half(steps)}"
    if rest := steps[_LONGEST:]:
        caption += f" The {len(rest)} that are not shown take {microseconds(sum(x.median_us for x in rest))} together."
    used = {kind: name for kind, name in KINDS.items() if kind in kinds.values()}
    return element(
        "section",
        title,
        element("p", caption, class_="quiet"),
        legend({**used, "between": "between layers"}),
        element(
            "div",
            element("figure", element("h3", "The slowest kernel calls"), bar_chart(bars, "Time of the slowest steps")),
            element(
                "div",
                element("figure", element("h3", "Sparsity and speed"), *_speed_plot(report.layers, steps, kinds)),
                element("h3", "By kind"),
                _kinds_table(profile, kinds),
            ),
            class_="charts",
        ),
        id="time",
    )


def _half(steps: Sequence[StepTime]) -> str:
    """How few steps, the slowest first, take half of the time."""
    count = 1 + sum(spent < 0.5 for spent in itertools.accumulate(step.share for step in steps))
    return "The slowest takes half of the time." if count == 1 else f"The slowest {count} take half of the time."


def _speed_plot(layers: Sequence[LayerRecord], steps: Sequence[StepTime], kinds: Mapping[str, str]) -> list[Markup]:
    """``steps``: the slowest first."""
    numbers = {layer.name: str(index) for index, layer in enumerate(layers, start=1)}
    timed = [step for step in steps if step.is_layer and step.gops]
    if not timed:
        return [element("p", "No layer takes a time that can be measured.", class_="quiet")]
    largest, slowest = timed[0].share, timed[:_NAMED]
    dots = [
        Dot(
            100 * (1 - step.macs_done / step.macs if step.macs else 0.0),
            step.gops or 0.0,
            f"{clean(step.name)}: {microseconds(step.median_us)}, {step.kernel}",
            kinds[step.name],
            step.share / largest,
            numbers[step.name] if step in slowest else "",
        )
        for step in timed
    ]
    across = Axis("zero weights, %", from_zero=True, up_to=100)
    up = Axis("speed counted as if dense, 10⁹ operations a second", "{:,.0f}".format, from_zero=True)
    caption = (
        "The larger a dot, the more of the time its layer takes: large and low is where time can be won. Numbers are "
        "the table's."
    )
    return [scatter_plot(dots, across, up, "Speed of each layer against its sparsity"), element("figcaption", caption)]


def _kinds_table(profile: Profile, kinds: Mapping[str, str]) -> Markup:
    """Time by kind of kernel, and what surrounds the kernels."""
    total = (profile.layers_us + profile.between_us) or 1.0
    rows: list[tuple[str, str, float, str]] = []
    for kind, name in {**KINDS, "between": "between layers"}.items():
        times = [step.median_us for step in profile.steps if (kinds[step.name] if step.is_layer else "between") == kind]
        if times:
            rows.append((name, str(len(times)), sum(times), f"{100 * sum(times) / total:.1f} %"))
    rows.append(("all calls, each timed alone", str(len(profile.steps)), total, "100.0 %"))
    rows.append(("one inference in one go", "", profile.inference_us, ""))
    rows.append(("one call from Python, arrays copied in and out", "", profile.call_us, ""))
    return sortable_table(
        [("kernels", False), ("calls", True), ("time", True), ("share", True)],
        [
            element(
                "tr",
                element("td", name),
                number_cell(calls, float(calls) if calls else None),
                number_cell(microseconds(time), time),
                number_cell(share, time if share else None),
            )
            for name, calls, time, share in rows
        ],
    )
