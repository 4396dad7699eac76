"""The report's section on error: what brings it in each layer, and how it gathers along the network."""

from __future__ import annotations

from collections.abc import Sequence

from pumice.loader import clean
from pumice.record import LayerRecord
from pumice.report.charts import Axis, Bar, Dot, bar_chart, legend, scatter_plot
from pumice.report.data import Report
from pumice.report.formats import KINDS, SOURCES, layer_kind, noise_by_source, percent, total_noise
from pumice.report.markup import Markup, element

_LONGEST = 20  # bars of the chart
_NAMED = 5  # layers that the plot gives the number of
_SMALL = 0.02  # of a dot


def noise_section(report: Report) -> Markup:
    """The error of each layer: its sources, where they were told apart, and the sum along the network."""
    layers = report.layers
    noisy = sorted((layer for layer in layers if layer.noise), key=lambda layer: -total_noise(layer))
    gathered = (
        "What rounding to int8 has brought into each layer's output when the whole network computes as compiled, "
        "against the same network, pruned already, in float32: 20 dB is noise of 1 % of the signal's energy, 30 dB of "
        "0.1 %. Numbers are the table's."
    )
    plots = [element("figure", element("h3", "Rounding error along the network"), *_snr_plot(layers, gathered))]
    missing = None
    if noisy:
        plots.insert(0, element("figure", element("h3", "Noise by source"), *_noise_bars(noisy)))
    else:
        missing = element("p", "How much pruning and rounding bring in each layer was not measured.", class_="quiet")
    title = element("h2", "What brings the error")
    return element("section", title, missing, element("div", *plots, class_="charts"), id="error")


def _noise_bars(noisy: Sequence[LayerRecord]) -> list[Markup]:
    bars = [Bar(layer.name, percent(total_noise(layer)), noise_by_source(layer)) for layer in noisy[:_LONGEST]]
    caption = (
        "What each source brings to a layer's output by itself, in % of the signal's energy, when everything before "
        "the layer is exact."
    )
    if len(noisy) > len(bars):
        caption += f" {len(noisy) - len(bars)} layers with less noise are not shown."
    return [legend(SOURCES), bar_chart(bars, "Noise of each layer by source"), element("figcaption", caption)]


def _snr_plot(layers: Sequence[LayerRecord], caption: str) -> list[Markup]:
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
            size=_SMALL,
            mark=str(index) if index in worst else "",
        )
        for index, layer in measured
    ]
    across, up = Axis("layer, in the order of execution"), Axis("signal to noise, dB: higher is better")
    used = {kind: name for kind, name in KINDS.items() if kind in {dot.kind for dot in dots}}
    plot = scatter_plot(dots, across, up, "Signal-to-noise ratio of each layer")
    return [legend(used), plot, element("figcaption", caption)]
