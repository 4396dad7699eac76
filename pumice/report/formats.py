"""What the sections of the report share: kinds of layers, sources of noise, numbers in words."""

from __future__ import annotations

from pumice.record import LayerRecord

# Names by the kinds that have a colour in page.css.
KINDS = {"sparse": "sparse", "dense": "dense int8", "float": "float32"}
SOURCES = {"pruning": "pruning", "weights": "rounding of weights", "activations": "rounding of activations"}


def layer_kind(layer: LayerRecord) -> str:
    """``sparse``, ``dense`` (in int8) or ``float``: the colours of a report."""
    return "sparse" if "sparse" in layer.kernel else "dense" if layer.dtype == "int8" else "float"


def noise_by_source(layer: LayerRecord) -> dict[str, float]:
    """Noise over signal of the layer's output, by the keys of ``SOURCES``."""
    return {source: max(0.0, layer.noise.get(source, 0.0)) for source in SOURCES}


def total_noise(layer: LayerRecord) -> float:
    """All sources together."""
    return sum(noise_by_source(layer).values())


def microseconds(value: float) -> str:
    """A time in microseconds, in words."""
    return f"{value / 1000:.2f} ms" if value >= 1000 else f"{value:.1f} µs" if value >= 0.05 else "< 0.1 µs"


def percent(share: float) -> str:
    """A share that may be tiny, or above one."""
    value = 100 * share
    if 0 < value < 0.001:
        return "< 0.001 %"
    return f"{value:,.0f} %" if value >= 10 or value == 0 else f"{value:#.2g} %"


def digits(value: float, count: int) -> str:
    """A positive number to so many digits, with its zeros: ``0.410``, ``6.0``, ``1,234``."""
    return f"{value:,.0f}" if value >= 10 ** (count - 1) else f"{value:#.{count}g}"
