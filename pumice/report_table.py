"""The table per layer that ``compile`` and ``inspect`` print: what became of each layer, and why."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from pumice.loader import clean as clean
from pumice.record import LayerRecord

_MIN_NAME = 12  # columns that a layer's name keeps, however narrow the terminal
_HEADINGS = ("layer", "operator", "shape", "pattern", "zeros", "type", "kernel", "bytes", "SNR dB", "why")
_LEFT = {"layer", "operator", "shape", "pattern", "type", "kernel", "why"}


def format_report(manifest: dict[str, Any], width: int) -> str:
    """The report of a manifest: what the model takes and gives, the table, the totals."""
    layers = [LayerRecord.from_json(entry) for entry in manifest["layers"]]
    lines = [clean(manifest["source"]["file"])]
    if target := manifest.get("target"):
        lines[0] += f" for {target['name']} ({target['isa']}, {target['architecture']})"
        lines.append(f"  needs  {', '.join(target['features']) or 'any CPU of this architecture'}")
    for kind in ("inputs", "outputs"):
        for entry in manifest[kind]:
            shape = "x".join(map(str, entry["shape"])) or "scalar"
            line = f"  {kind[:-1]:<6} {clean(entry['name'])}: {entry['dtype']} {shape}"
            if "scale" in entry:
                line += f" (in int8: scale {entry['scale']:.4g}, zero point {entry['zero_point']})"
            lines.append(line)
    if "workspace" in manifest:
        sizes = {kind: format_bytes(manifest[kind]) for kind in ("weights", "workspace")}
        lines.append(f"  memory {sizes['weights']} of weights, {sizes['workspace']} of workspace")
    for name, entry in manifest.get("accuracy", {}).items():
        before = "" if entry["before"] is None else f"{entry['before']:.4g} -> "
        lines.append(f"  {clean(name)} {before}{entry['after']:.4g} (higher is better)")
    if digest := manifest["source"]["sha256"]:
        lines.append(f"  source SHA-256 {digest}")
    return "\n".join([*lines, "", format_layers(layers, width), *_format_targets(manifest.get("targets", []))])


def format_variants(variants: Sequence[dict[str, Any]]) -> str:
    """The table of what a bundle holds, the first choice first."""
    rows = [("variant", "target", "kernels", "architecture", "bytes", "SHA-256")]
    for entry in variants:
        target = entry["target"]
        kinds = [clean(str(target[key])) for key in ("name", "isa", "architecture")]
        rows.append((clean(entry["name"]), *kinds, format_bytes(entry["bytes"]), entry["sha256"][:16]))
    return "\n".join(format_table(rows, 120, {"variant", "target", "kernels", "architecture", "SHA-256"}))


def _format_targets(previews: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each target: how many layers would run on which kind of kernel."""
    lines = ["", "in int8 each target would run:"] if previews else []
    for preview in previews:
        kinds = Counter(choice["kernel"].partition(" int8")[0] for choice in preview["layers"].values())
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        lines.append(f"  {preview['name']:<18} {preview['isa']:<9} {counts}")
    return lines


def format_layers(layers: Sequence[LayerRecord], width: int) -> str:
    """The table, its footnotes (each reason once) and the totals; columns that say nothing are left out."""
    if not layers:
        return "no convolution or matrix product with a weight"
    reasons: dict[str, int] = {}
    rows = [_HEADINGS, *(_row(layer, reasons) for layer in layers)]
    shown = [c for c in range(len(_HEADINGS)) if c == 0 or any(row[c] for row in rows[1:])]
    table = [[row[c] for c in shown] for row in rows]
    footnotes = [f"[{number}] {reason}" for reason, number in reasons.items()]
    return "\n".join(
        [*format_table(table, width, _LEFT), "", *footnotes, *([""] if footnotes else []), _totals(layers)]
    )


def format_table(rows: Sequence[Sequence[str]], width: int, left: Collection[str]) -> list[str]:
    """Lines of a table whose first row is its heading; the first column gives way when ``width`` is short.

    The columns with the headings ``left`` are aligned there, the others, numbers, to the right.
    """
    widths = [max(_columns(row[c]) for row in rows) for c in range(len(rows[0]))]
    spare = width - sum(widths[1:]) - 2 * (len(widths) - 1)
    widths[0] = max(min(widths[0], spare), min(_MIN_NAME, widths[0]))
    lines = []
    for row in rows:
        cells = [shorten(row[0], widths[0]), *row[1:]]
        padded = [_pad(cell, w, name not in left) for cell, w, name in zip(cells, widths, rows[0], strict=True)]
        lines.append("  ".join(padded).rstrip())
    return [lines[0], "-" * max(map(_columns, lines)), *lines[1:]]


def shorten(text: str, width: int) -> str:
    """``text`` cut in the middle to ``width`` columns: in a layer's name both ends tell."""
    if _columns(text) <= width:
        return text
    head, tail = (width - 1) // 2, width - 1 - (width - 1) // 2
    left, right = "", ""
    for c in text[:head]:
        left += c if _columns(left + c) <= head else ""
    for c in reversed(text[-tail:]):
        right = c + right if _columns(c + right) <= tail else right
    return f"{left}…{right}"


def format_bytes(count: float) -> str:
    """``12.3 kB``: three digits are what a reader compares."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _row(layer: LayerRecord, reasons: dict[str, int]) -> tuple[str, ...]:
    why = [clean(text) for text in (layer.reason, *layer.notes) if text]
    marks = "".join(f"[{reasons.setdefault(text, len(reasons) + 1)}]" for text in why)
    compiled = f" -> {format_bytes(layer.compiled_bytes)}" if layer.compiled_bytes else ""
    return (
        clean(layer.name),
        layer.operator,
        "x".join(map(str, layer.shape)),
        layer.pattern,
        f"{100 * layer.sparsity:.1f} %" if layer.sparsity else "",
        layer.dtype,
        layer.kernel,
        f"{format_bytes(layer.source_bytes)}{compiled}",
        "" if layer.snr_db is None else f"{layer.snr_db:.1f}",
        marks,
    )


def _totals(layers: Sequence[LayerRecord]) -> str:
    source, compiled = sum(x.source_bytes for x in layers), sum(x.compiled_bytes for x in layers)
    macs = sum(x.macs for x in layers)
    done = sum(x.macs * (1 - x.sparsity) for x in layers)
    int8, sparse = sum(x.dtype == "int8" for x in layers), sum("sparse" in x.kernel for x in layers)
    parts = [f"{len(layers)} layers", f"{int8} int8", f"{sparse} sparse"] if compiled else [f"{len(layers)} layers"]
    parts.append(f"weights {format_bytes(source)}" + (f" -> {format_bytes(compiled)}" if compiled else ""))
    if macs:
        parts.append(f"{macs:,} multiply-adds, {100 * done / macs:.1f} % of them with a weight that is not 0")
    return "total: " + ", ".join(parts)


def _columns(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - _columns(text))
    return space + text if right else text + space
