"""HTML and SVG from elements: text is escaped where it goes in, so that a model's names can be nothing but text."""

from __future__ import annotations

import html
from collections.abc import Sequence

from pumice.loader import clean

_VOID = {"meta", "br", "col"}  # elements that have no end


class Markup(str):
    """Text that is markup already."""


def element(tag: str, *children: str | None, **attributes: str | float | bool | None) -> Markup:
    """``element("a", "x < y", href="#z")`` -> ``<a href="#z">x &lt; y</a>``.

    Children that are no ``Markup`` are escaped, and what is not printable in them is spelt out. ``None`` is left out;
    ``_`` in an attribute's name is ``-``, and one at its end is dropped (``class_``).
    """
    parts = []
    for key, value in attributes.items():
        name = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(f" {name}")
        elif value is not None and value is not False:
            parts.append(f' {name}="{_escape(str(value))}"')
    start = f"<{tag}{''.join(parts)}>"
    return Markup(start if tag in _VOID else f"{start}{join(*children)}</{tag}>")


def join(*children: str | None) -> Markup:
    """Children one after the other, escaped as ``element`` does."""
    return Markup("".join(c if isinstance(c, Markup) else _escape(c) for c in children if c is not None))


def sortable_table(headings: Sequence[tuple[str, bool]], rows: Sequence[Markup]) -> Markup:
    """A table that page.js sorts, in a frame of its own where it is too wide; each heading: its text, is it numbers?"""
    cells = [element("th", text, class_="number" if right else None, scope="col") for text, right in headings]
    table = element("table", element("thead", element("tr", *cells)), element("tbody", *rows), class_="sortable")
    return element("div", table, class_="wide")


def number_cell(text: str, value: float | None, below: str = "") -> Markup:
    """A cell with a number in words, aligned to the right and sorted by ``value``; None comes last."""
    second = second_line(below) if below else None
    return element("td", text, second, class_="number", data_value="" if value is None else f"{value:.9g}")


def second_line(text: str) -> Markup:
    """What stands small below the text of a cell."""
    return element("div", text, class_="below")


def _escape(text: str) -> str:
    return html.escape(clean(text))
