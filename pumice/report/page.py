"""The report as one HTML page: for a manager what was gained and lost, below it for an engineer where and why.

Nothing is loaded from anywhere: style, script and charts are inside, and the page's own policy forbids the rest.
"""

from __future__ import annotations

import importlib.resources

from pumice.report.data import Accuracy, Report
from pumice.report.formats import digits, layer_kind
from pumice.report.layers import layer_section
from pumice.report.markup import Markup, element, join
from pumice.report.noise import noise_section
from pumice.report.points import frontier_section
from pumice.report.reproduce import glossary_section, reproduce_section
from pumice.report.times import time_section
from pumice.report_table import clean, format_bytes, shorten

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_TITLE = 120  # columns of a file's name in a heading


def format_page(report: Report, command: str) -> str:
    """The whole page. ``command`` is what made it."""
    files = importlib.resources.files("pumice.report")
    style, script = (Markup(files.joinpath(name).read_text("utf-8")) for name in ("page.css", "page.js"))
    title = shorten(clean(report.manifest["source"]["file"]), _TITLE)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{title}: Pumice report"),
        element("style", style),
    )
    sections = {
        "time": ("Time", time_section(report)),
        "error": ("Error", noise_section(report)),
        "layers": ("Layers", layer_section(report)),
        "frontier": ("Other settings", frontier_section(report)),
        "reproduce": ("Reproduce", reproduce_section(report, command)),
        "words": ("Words", glossary_section()),
    }
    links = [element("a", name, href=f"#{key}") for key, (name, _) in sections.items()]
    body = element(
        "body",
        element("header", element("h1", title), element("p", _subtitle(report), class_="quiet")),
        element("main", _summary(report), element("nav", *links), *(section for _, section in sections.values())),
        element("script", script),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _subtitle(report: Report) -> str:
    target = report.manifest["target"]
    return f"compiled by Pumice for {target['name']} ({target['architecture']}, {target['isa']} kernels)"


def _summary(report: Report) -> Markup:
    """What was gained and lost, before and after, and what was done for it."""
    accuracy = [_accuracy_card(entry) for entry in report.accuracy[:3]] or [_no_accuracy_card()]
    cards = element("div", *accuracy, _time_card(report), _size_card(report), class_="cards")
    rest = [f"{a.name}: {_number(a.before)} before, {_number(a.after)} after." for a in report.accuracy[3:]]
    remarks = [*rest, *(report.remarks[key] for key in ("original", "peer") if key in report.remarks)]
    return join(cards, element("p", _what_was_done(report)), *(element("p", text, class_="remark") for text in remarks))


def _what_was_done(report: Report) -> str:
    layers = report.layers
    kinds = [layer_kind(layer) for layer in layers]
    macs = sum(layer.macs for layer in layers)
    text = (
        f"Of {len(layers)} layers, {sum(layer.dtype == 'int8' for layer in layers)} compute in int8 (8-bit integers) "
        f"and {kinds.count('sparse')} leave out weights that are zero."
    )
    if macs:
        zero = sum(layer.macs * layer.sparsity for layer in layers) / macs
        text += f" In the whole network, {100 * zero:.0f} % of the multiplications are with a weight that is zero."
    return text


def _accuracy_card(entry: Accuracy) -> Markup:
    verdict, tone = None, ""
    if entry.before is not None:
        change = entry.after - entry.before
        direction = "higher" if change > 0 else "lower"
        verdict = f"{abs(change):.2g} {direction} than the original" if change else "the same as the original"
        tone = "bad" if change < 0 else "good"
    small = f"Higher is better; measured {entry.measured}."
    if entry.before is None:
        small += " With --model MODEL.onnx the original is measured too."
    before = None if entry.before is None else _number(entry.before)
    title = "Accuracy" if entry.name == "accuracy" else f"Accuracy: {entry.name}"
    return _card(title, before, _number(entry.after), verdict, tone, small)


def _no_accuracy_card() -> Markup:
    how = "Give --eval SCRIPT.py:FUNCTION, your own measure, and --model MODEL.onnx, the original."
    return _card("Accuracy", None, "not measured", None, "", how)


def _time_card(report: Report) -> Markup:
    if not report.timings:
        return _card("Time of one inference", None, "not measured", None, "", report.remarks.get("time", ""))
    ours, *others = report.timings
    if not others:
        small = f"Median on {report.place}. With --model MODEL.onnx the original is timed too."
        return _card("Time of one inference", None, _milliseconds(ours.median), None, "", small)
    original = others[0]
    faster = original.ratio >= 1
    ratio = original.ratio if faster else 1 / original.ratio
    verdict = f"{digits(ratio, 2)} times as fast" if faster else f"slower: takes {digits(ratio, 2)} times as long"
    small = f"Median on {report.place}. Before: the original in {original.name}. Both were timed in turns."
    before, after = _milliseconds(original.median), _milliseconds(ours.median)
    return _card("Time of one inference", before, after, verdict, "good" if faster else "bad", small)


def _size_card(report: Report) -> Markup:
    source = sum(layer.source_bytes for layer in report.layers)
    compiled = sum(layer.compiled_bytes for layer in report.layers)
    weights = f"The layers' weights: {format_bytes(source)} before, {format_bytes(compiled)} after."
    file = f"The library, code and all other data included, is a file of {format_bytes(report.library.bytes)}."
    if report.original:
        before, after = report.original.bytes, report.library.bytes
        return _card("Size of the file", format_bytes(before), format_bytes(after), *_smaller(before, after), weights)
    if not source or not compiled:
        return _card("Size of the file", None, format_bytes(report.library.bytes), None, "", weights)
    return _card(
        "Size of the layers' weights", format_bytes(source), format_bytes(compiled), *_smaller(source, compiled), file
    )


def _smaller(before: float, after: float) -> tuple[str, str]:
    ratio = before / max(1, after)
    if ratio < 1:
        return f"{digits(1 / ratio, 2)} times as large", "bad"
    return f"{digits(ratio, 2)} times smaller", "good"


def _card(title: str, before: str | None, after: str, verdict: str | None, tone: str, small: str) -> Markup:
    numbers = [element("span", after, class_="after")]
    if before is not None:
        numbers.insert(0, element("span", before, " →", class_="before"))
    return element(
        "section",
        element("h2", shorten(clean(title), _TITLE)),
        element("div", *numbers, class_="numbers"),
        element("p", verdict, class_=f"verdict {tone}") if verdict else None,
        element("p", small, class_="small"),
        class_="card",
    )


def _milliseconds(value: float) -> str:
    return f"{digits(value, 3)} ms"


def _number(value: float | None) -> str:
    """Four digits, as 0.9380, 93.80 or 1,234: one as long as the other."""
    if value is None:
        return "not measured"
    size = abs(value)
    if size >= 1000 or 0 < size < 0.01:
        return f"{value:,.0f}" if size >= 1000 else f"{value:.2g}"
    return f"{value:.{4 if size < 1 else 4 - len(str(int(size)))}f}"
