"""The charts of the report page, as inline SVG: bars and scatter plots that keep their text size at any width.

Places across are in percent and sizes in pixels, so a chart needs no script to fit its column. Colours are classes
(``kind-sparse`` ...) of page.css, which knows light and dark.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pumice.loader import clean
from pumice.report.markup import Markup, element, join
from pumice.report_table import shorten

_ROW, _BAR, _TEXT = 38, 10, 13  # pixels: of a row, its bar, the label above it
_LABEL = 40  # columns of a label
_TOOLTIP = 300  # columns of what shows on hovering
_HEIGHT, _TOP, _BOTTOM = 320, 14, 46  # pixels of a scatter plot and its margins
_LEFT, _RIGHT = 14.0, 97.0  # percent between which points lie
_DOTS = (3.5, 12.0)  # radius of the smallest and the largest


@dataclass(frozen=True)
class Bar:
    """One row: a label, the number in words, and lengths by kind, one after the other."""

    label: str
    number: str
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Dot:
    """One point: what hovering shows, its kind (colour), its size between 0 and 1, and the text above it."""

    x: float
    y: float
    label: str
    kind: str
    size: float = 0.0
    mark: str = ""


@dataclass(frozen=True)
class Axis:
    """What an axis is called, and how a number on it is written; from zero on where that is what compares."""

    title: str
    number: Callable[[float], str] = "{:g}".format
    from_zero: bool = False
    up_to: float | None = None
    is_logarithmic: bool = False  # of positive numbers


def bar_chart(rows: Sequence[Bar], title: str) -> Markup:
    """Horizontal bars on one scale, the longest as wide as the chart. ``title`` is read out instead of the picture."""
    longest = max((sum(row.parts.values()) for row in rows), default=0.0) or 1.0
    drawn = [_draw_bar(row, index * _ROW, longest) for index, row in enumerate(rows)]
    return element("svg", *drawn, class_="bars", width="100%", height=_ROW * len(rows), role="img", aria_label=title)


def scatter_plot(
    dots: Sequence[Dot], across: Axis, up: Axis, title: str, line: Sequence[tuple[float, float]] = ()
) -> Markup:
    """Points on two axes, the largest behind; ``line`` joins places on them."""
    x_ticks, y_ticks = _ticks([dot.x for dot in dots], across), _ticks([dot.y for dot in dots], up)

    def x(value: float) -> str:
        return f"{_LEFT + (_RIGHT - _LEFT) * _share(value, x_ticks, across):.2f}%"

    def y(value: float) -> str:
        return f"{_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * _share(value, y_ticks, up):.1f}"

    parts = []
    for tick in y_ticks:
        parts.append(element("line", class_="grid", x1=f"{_LEFT}%", x2=f"{_RIGHT}%", y1=y(tick), y2=y(tick)))
        label = element("text", up.number(tick), class_="tick end", x=f"{_LEFT - 1.5}%", y=y(tick), dy="0.35em")
        parts.append(label)
    for tick in x_ticks:
        label = element("text", across.number(tick), class_="tick middle", x=x(tick), y=_HEIGHT - _BOTTOM + 18)
        parts.append(label)
    parts.append(element("text", across.title, class_="axis middle", x=f"{(_LEFT + _RIGHT) / 2}%", y=_HEIGHT - 6))
    for (x1, y1), (x2, y2) in itertools.pairwise(line):
        parts.append(element("line", class_="frontier", x1=x(x1), x2=x(x2), y1=y(y1), y2=y(y2)))
    parts += [_draw_dot(dot, x(dot.x), y(dot.y)) for dot in sorted(dots, key=lambda dot: -dot.size)]
    parts += _draw_marks([(dot, x(dot.x), y(dot.y)) for dot in dots if dot.mark])
    picture = element("svg", *parts, class_="plot", width="100%", height=_HEIGHT, role="img", aria_label=title)
    return join(element("p", "↑ ", up.title, class_="axis"), picture)


def legend(kinds: Mapping[str, str]) -> Markup:
    """What the colours mean: names by kind."""
    return element(
        "p",
        *(
            element(
                "span",
                element("svg", element("rect", width=11, height=11, rx=2, class_=f"kind-{kind}"), width=11, height=11),
                " ",
                name,
            )
            for kind, name in kinds.items()
        ),
        class_="legend",
    )


def _draw_bar(row: Bar, top: int, longest: float) -> Markup:
    parts, start, y = [], 0.0, top + _TEXT + 5
    for kind, length in row.parts.items():
        width = 100 * length / longest
        rectangle = element("rect", x=f"{start:.3f}%", y=y, width=f"{width:.3f}%", height=_BAR, class_=f"kind-{kind}")
        parts.append(rectangle)
        start += width
    label = element("text", shorten(clean(row.label), _LABEL), class_="label", x=0, y=top + _TEXT)
    number = element("text", row.number, class_="label end", x="100%", y=top + _TEXT)
    tooltip = element("title", f"{shorten(clean(row.label), _TOOLTIP)}: {row.number}")
    return element("g", tooltip, label, number, *parts)


def _draw_dot(dot: Dot, x: str, y: str) -> Markup:
    tooltip = element("title", shorten(clean(dot.label), _TOOLTIP))
    return element("circle", tooltip, class_=f"kind-{dot.kind}", cx=x, cy=y, r=f"{_radius(dot):.1f}")


def _draw_marks(placed: Sequence[tuple[Dot, str, str]]) -> list[Markup]:
    """The texts above their dots; one that would cover another is left out (its dot still shows it on hovering)."""
    drawn: list[tuple[float, float]] = []
    parts = []
    for dot, x, y in placed:
        across, up = float(x.rstrip("%")), float(y) - _radius(dot) - 4
        if all(abs(across - other) > 5 or abs(up - height) > 11 for other, height in drawn):
            drawn.append((across, up))
            parts.append(element("text", dot.mark, class_="middle", x=x, y=f"{up:.1f}"))
    return parts


def _radius(dot: Dot) -> float:
    smallest, largest = _DOTS
    return smallest + (largest - smallest) * math.sqrt(min(1.0, max(0.0, dot.size)))


def _share(value: float, ticks: Sequence[float], axis: Axis) -> float:
    """How far along its axis a value lies: 0 at the first tick, 1 at the last."""
    if axis.is_logarithmic:
        return math.log(value / ticks[0]) / math.log(ticks[-1] / ticks[0])
    return (value - ticks[0]) / (ticks[-1] - ticks[0])


def _ticks(values: Sequence[float], axis: Axis) -> list[float]:
    """Round numbers, about five, the first not above and the last not below any value."""
    if axis.is_logarithmic:
        return _logarithmic_ticks(min(values), max(values))
    low, high = min(values, default=0.0), max(values, default=1.0)
    low = min(0.0, low) if axis.from_zero else low
    high = high if axis.up_to is None else max(high, axis.up_to)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-30):
        low, high = (low - 0.5, high + 0.5) if low == 0 else (low - abs(low) / 10, high + abs(high) / 10)
    step = _round_up((high - low) / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _logarithmic_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten; over more than three of these, the powers alone."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    start = max(index for index, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    end = next((index for index, tick in enumerate(ticks) if tick >= high * (1 - 1e-9)), len(ticks) - 1)
    return ticks[start : max(end, start + 1) + 1]


def _round_up(step: float) -> float:
    """The next of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))
