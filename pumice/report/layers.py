"""The report's sections on layers: where the time goes, what brings the error, and the table with every reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pumice.loader import clean
from pumice.record import LayerRecord
from pumice.report.charts import Axis, Bar, Dot, bar_chart, legend, scatter_plot
from pumice.report.data import Report
from pumice.report.markup import Markup, element, number_cell, sortable_table
from pumice.report_table import format_bytes, shorten

_KINDS = {"sparse": "sparse", "dense": "dense int8", "float": "float32"}
_SOURCES = {"pruning": "pruning", "weights": "rounding of weights", "activations": "rounding of activations"}
_LONGEST = 20  # bars of a chart
_SUMMARY = 64  # columns of a reason before it is unfolded
_NAMED = 3  # layers that a chart names


def layer_kind(layer: LayerRecord) -> str:
    """``sparse``, ``dense`` (in int8) or ``float``: the colours of a report."""
    return "sparse" if "sparse" in layer.kernel else "dense" if layer.dtype == "int8" else "float"


def time_section(report: Report) -> Markup:
    """The slowest steps as bars, and speed against sparsity."""
    title = element("h2", "Where the time goes")
    if not report.profile:
        return element("section", title, element("p", report.remarks.get("time", "It was not measured.")), id="time")
    kinds = {layer.name: layer_kind(layer) for layer in report.layers}
    steps = sorted(report.profile.steps, key=lambda step: -step.median_us)
    bars = [
        Bar(
            step.name if step.is_layer else f"{step.kernel} (between layers)",
            f"{_microseconds(step.median_us)}, {100 * step.share:.1f} %",
            {kinds[step.name] if step.is_layer else "between": step.median_us},
        )
        for step in steps[:_LONGEST]
    ]
    rest = sum(step.median_us for step in steps[_LONGEST:])
    caption = f"Each of the {len(steps)} kernel calls, timed alone on {report.place}; {_half(report)}"
    if rest:
        caption += f" The {len(steps) - _LONGEST} calls that are not shown take {_microseconds(rest)} together."
    used = {kind: name for kind, name in _KINDS.items() if kind in kinds.values()}
    return element(
        "section",
        title,
        element("p", caption, class_="quiet"),
        legend({**used, "between": "between layers"}),
        element(
            "div",
            element("figure", element("h3", "The slowest kernel calls"), bar_chart(bars, "Time of the slowest steps")),
            element("figure", element("h3", "Sparsity and speed"), *_speed_plot(report, kinds)),
            class_="charts",
        ),
        id="time",
    )


def noise_section(report: Report) -> Markup:
    """The error of each layer: its sources, where they were told apart, and the sum along the network."""
    layers = report.layers
    noisy = sorted((layer for layer in layers if layer.noise), key=lambda layer: -_noise(layer))
    split = [element("p", "It was not measured what brings the error of a layer.", class_="quiet")]
    if noisy:
        bars = [Bar(layer.name, _percent(_noise(layer)), _split(layer)) for layer in noisy[:_LONGEST]]
        more = len(noisy) - len(bars)
        split = [
            legend(_SOURCES),
            bar_chart(bars, "Noise of the noisiest layers by source"),
            element("figcaption", f"{more} layers with less noise are not shown.") if more else None,
        ]
    explained = (
        "Left: the noise that each source brings to a layer's output by itself, in % of the signal's energy, when "
        "everything before the layer is exact. Right: the error that has gathered in each layer's output when the "
        "whole network computes as compiled, over calibration data (30 dB is noise of 0.1 %)."
    )
    return element(
        "section",
        element("h2", "What brings the error"),
        element("p", explained, class_="quiet"),
        element(
            "div",
            element("figure", element("h3", "Noise by source, the noisiest layers"), *split),
            element("figure", element("h3", "Error along the network"), *_snr_plot(layers)),
            class_="charts",
        ),
        id="error",
    )


def layer_section(report: Report) -> Markup:
    """The table per layer, sortable where scripts run; each reason unfolds."""
    layers, times = report.layers, report.layer_microseconds()
    total = sum(step.median_us for step in report.profile.steps) if report.profile else 0.0
    has_noise = any(layer.noise for layer in layers)
    headings = [("#", True), ("layer", False), ("operator", False), ("shape", False), ("pattern", False)]
    headings += [("zeros", True), ("type", False), ("kernel", False), ("bytes before", True), ("bytes after", True)]
    headings += [("time", True), ("share", True)] if times else []
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
        sums += f", and {_microseconds(sum(times.values()))} of the {_microseconds(total)} that all kernel calls take"
    table = sortable_table(headings, rows)
    return element("section", title, element("p", f"{sums}.", class_="quiet"), table, id="layers")


def _cells(index: int, layer: LayerRecord, times: Mapping[str, float], total: float, has_noise: bool) -> list[Markup]:
    time = times.get(layer.name)
    cells = [
        number_cell(str(index), index),
        element("td", _label(layer.name), class_="name"),
        element("td", layer.operator, class_="short"),
        element("td", "×".join(map(str, layer.shape)), class_="short"),
        element("td", layer.pattern, class_="short"),
        number_cell(f"{100 * layer.sparsity:.1f} %", layer.sparsity),
        element("td", layer.dtype, class_="short"),
        element("td", layer.kernel, class_="short"),
        number_cell(format_bytes(layer.source_bytes), layer.source_bytes),
        number_cell(format_bytes(layer.compiled_bytes), layer.compiled_bytes),
    ]
    if times:
        cells.append(number_cell("" if time is None else _microseconds(time), time))
        cells.append(number_cell("" if time is None or not total else f"{100 * time / total:.1f} %", time))
    if has_noise:
        noise = _noise(layer) if layer.noise else None
        cells.append(number_cell("" if noise is None else _percent(noise), noise))
    cells.append(number_cell("" if layer.snr_db is None else f"{layer.snr_db:.1f} dB", layer.snr_db))
    return [*cells, element("td", _why(layer), class_="why")]


def _why(layer: LayerRecord) -> Markup:
    """The reason, shortened, which unfolds to all of it, the notes and what is known besides."""
    facts = [layer.reason, *layer.notes, f"weight: {layer.weight}"]
    if layer.pruned_by:
        facts.append(f"zeros: {layer.pruned_by}, {100 * layer.block_sparsity:.1f} % of the 1x4 blocks")
    facts.append(f"multiply-adds as if dense: {layer.macs:,}")
    if layer.input_scale is not None:
        facts.append(f"input in int8: scale {layer.input_scale:.6g}, zero point {layer.input_zero_point}")
    if layer.output_scale is not None:
        facts.append(f"output in int8: scale {layer.output_scale:.6g}, zero point {layer.output_zero_point}")
    if layer.noise:
        facts += [f"noise from {_SOURCES[source]}: {_percent(share)}" for source, share in _split(layer).items()]
    first = layer.reason or next(iter(layer.notes), "") or "details"
    return element(
        "details",
        element("summary", first if len(first) <= _SUMMARY else f"{first[: _SUMMARY - 1].rstrip()}…"),
        element("ul", *(element("li", fact) for fact in facts if fact)),
    )


def _speed_plot(report: Report, kinds: Mapping[str, str]) -> list[Markup]:
    steps = [step for step in report.profile.steps if step.is_layer and step.gops] if report.profile else []
    if not steps:
        return [element("p", "No layer's time could be told from nothing.")]
    largest = max(step.share for step in steps)
    slowest = {id(step) for step in sorted(steps, key=lambda step: -step.median_us)[:_NAMED]}
    dots = [
        Dot(
            100 * (1 - step.macs_done / step.macs if step.macs else 0.0),
            step.gops or 0.0,
            f"{clean(step.name)}: {_microseconds(step.median_us)}, {step.kernel}",
            kinds[step.name],
            step.share / largest,
            _short(step.name) if id(step) in slowest else "",
        )
        for step in steps
    ]
    across = Axis("zero weights, %", from_zero=True, up_to=100)
    up = Axis("speed counted as if dense, 10⁹ operations a second", "{:,.0f}".format, from_zero=True)
    caption = "The larger a dot, the more of the time its layer takes: large and low is where time can be won."
    return [scatter_plot(dots, across, up, "Speed of each layer against its sparsity"), element("figcaption", caption)]


def _snr_plot(layers: Sequence[LayerRecord]) -> list[Markup]:
    measured = [(index, layer) for index, layer in enumerate(layers, start=1) if layer.snr_db is not None]
    if not measured:
        return [element("p", "It was not measured (--no-layer-errors, or nothing is int8).", class_="quiet")]
    worst = {index for index, _ in sorted(measured, key=lambda pair: pair[1].snr_db or 0.0)[:_NAMED]}
    dots = [
        Dot(
            index,
            layer.snr_db or 0.0,
            f"{clean(layer.name)}: {layer.snr_db:.1f} dB",
            layer_kind(layer),
            mark=_short(layer.name) if index in worst else "",
        )
        for index, layer in measured
    ]
    across, up = Axis("layer, in the order of execution"), Axis("signal to noise, dB: higher is better")
    used = {kind: name for kind, name in _KINDS.items() if kind in {dot.kind for dot in dots}}
    return [legend(used), scatter_plot(dots, across, up, "Signal-to-noise ratio of each layer")]


def _half(report: Report) -> str:
    """How few steps take half of the time."""
    steps = sorted(report.profile.steps, key=lambda step: -step.median_us) if report.profile else []
    spent, count = 0.0, 0
    while steps and spent < 0.5 and count < len(steps):
        spent += steps[count].share
        count += 1
    return f"{count} of them take{'s' * (count == 1)} half of the time."


def _split(layer: LayerRecord) -> dict[str, float]:
    return {key: max(0.0, layer.noise.get(key, 0.0)) for key in _SOURCES}


def _noise(layer: LayerRecord) -> float:
    return sum(_split(layer).values())


def _label(name: str) -> Markup:
    """A layer's name; a very long one is cut in the middle, and whole among its details."""
    return element("code", shorten(clean(name), 80))


def _short(name: str) -> str:
    return shorten(clean(name), 24)


def _microseconds(value: float) -> str:
    return f"{value:.1f} µs" if value < 1000 else f"{value / 1000:.2f} ms"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
