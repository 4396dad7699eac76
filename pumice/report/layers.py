"""The report's table of layers, with every reason."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pumice.loader import clean
from pumice.record import LayerRecord
from pumice.report.data import Report
from pumice.report.formats import SOURCES, microseconds, noise_by_source, percent, total_noise
from pumice.report.markup import Markup, element, number_cell, second_line, sortable_table
from pumice.report_table import format_bytes, shorten

_NAME = 80  # columns of a layer's name
_SUMMARY = 160  # characters of a reason that stand in the table; all of it unfolds


def layer_section(report: Report) -> Markup:
    """The table per layer, sortable where scripts run; each reason unfolds."""
    layers, times = report.layers, report.layer_microseconds()
    total = sum(step.median_us for step in report.profile.steps) if report.profile else 0.0
    has_noise = any(layer.noise for layer in layers)
    headings = [("#", True), ("layer", False), ("zeros", True), ("kernel", False), ("bytes", True)]
    headings += [("time", True)] if times else []
    headings += [("noise", True)] if has_noise else []
    headings += [("SNR", True), ("why it is so", False)]
    rows = [
        element("tr", *_cells(index, layer, times, total, has_noise)) for index, layer in enumerate(layers, start=1)
    ]
    title = element("h2", "Every layer")
    if not rows:
        nothing = element("p", "The model has no convolution and no matrix product with a weight.")
        return element("section", title, nothing, id="layers")
    before, after = sum(x.source_bytes for x in layers), sum(x.compiled_bytes for x in layers)
    sums = f"Together {format_bytes(before)} before and {format_bytes(after)} after"
    if times:
        sums += f", and {microseconds(sum(times.values()))} of the {microseconds(total)} that all kernel calls take"
    table = sortable_table(headings, rows)
    return element("section", title, element("p", f"{sums}.", class_="quiet"), table, id="layers")


def _cells(index: int, layer: LayerRecord, times: Mapping[str, float], total: float, has_noise: bool) -> list[Markup]:
    shape = "×".join(map(str, layer.shape))
    before = f"of {format_bytes(layer.source_bytes)}"
    cells = [
        number_cell(str(index), index),
        element("td", _label(layer.name), second_line(f"{layer.operator} {shape}"), class_="name"),
        number_cell(f"{100 * layer.sparsity:.1f} %", layer.sparsity, layer.pattern),
        element("td", layer.kernel or "none", second_line(layer.dtype), class_="short"),
        number_cell(format_bytes(layer.compiled_bytes), layer.compiled_bytes, before),
    ]
    if times:
        time = times.get(layer.name)
        share = "" if time is None or not total else f"{100 * time / total:.1f} %"
        cells.append(number_cell("" if time is None else microseconds(time), time, share))
    if has_noise:
        noise = total_noise(layer) if layer.noise else None
        cells.append(number_cell("" if noise is None else percent(noise), noise))
    cells.append(number_cell("" if layer.snr_db is None else f"{layer.snr_db:.1f} dB", layer.snr_db))
    return [*cells, element("td", _why(layer), class_="why")]


def _why(layer: LayerRecord) -> Markup:
    """The reason, which unfolds to the notes and what is known besides."""
    first = layer.reason or "details"
    cut = first if len(first) <= _SUMMARY else f"{first[: _SUMMARY - 1].rstrip()}…"
    facts = [*([first] if cut != first else []), *layer.notes, f"weight: {layer.weight}"]
    if layer.pruned_by:
        facts.append(f"zeros: {layer.pruned_by}, {100 * layer.block_sparsity:.1f} % of the 1x4 blocks")
    facts.append(f"multiply-adds as if dense: {layer.macs:,}")
    if layer.input_scale is not None:
        facts.append(f"input in int8: scale {layer.input_scale:.6g}, zero point {layer.input_zero_point}")
    if layer.output_scale is not None:
        facts.append(f"output in int8: scale {layer.output_scale:.6g}, zero point {layer.output_zero_point}")
    if layer.noise:
        facts += [f"noise from {SOURCES[source]}: {percent(share)}" for source, share in noise_by_source(layer).items()]
    return element("details", element("summary", cut), element("ul", *(element("li", fact) for fact in facts)))


def _label(name: str) -> Markup:
    """A layer's name, which may break behind a dot; a very long one is cut in the middle (its details have all)."""
    parts = re.split(r"(?<=[./])", shorten(clean(name), _NAME))
    return element("code", *(piece for part in parts for piece in (part, Markup("<wbr>"))))
