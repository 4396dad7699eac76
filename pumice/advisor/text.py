"""Advice as text for a terminal: the layers, the points, what accuracy costs, what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pumice.advisor.advice import Advice, Point, cost_of, front
from pumice.advisor.layer_options import LayerTable
from pumice.report_table import clean, format_bytes, format_table

_WORST = 5  # layers named as the worst offenders


def format_advice(advice: Advice, width: int, every_option: bool = False) -> str:
    """All of it; ``every_option`` prints the options of each layer, not only the one that was chosen."""
    lines = [f"{clean(advice.source)} for {clean(advice.target)}", ""]
    lines += _options(advice, width) if every_option else _layers(advice, width)
    lines += ["", *_points(advice, width), "", *_prices(advice), *_offenders(advice)]
    lines += [f"left as they are: {len(advice.left)} layers"] if advice.left else []
    lines += [clean(f"  {name}: {why}") for name, why in advice.left.items()]
    lines += [f"- {clean(remark)}" for remark in advice.remarks]
    return "\n".join([*lines, *_training(advice)])


def _layers(advice: Advice, width: int) -> list[str]:
    rows = [("layer", "sensitivity", "chosen", "error", "pruning", "weights", "activations", "us", "bytes", "time by")]
    chosen = advice.chosen_options()
    for table, sensitivity in zip(advice.tables, advice.sensitivities, strict=True):
        label = chosen.get(table.name, table.options[table.dense()].label)
        option = next((option for option in table.options if option.label == label), None)
        cells = ("", "", "", "", "", "", "")
        if option is not None:
            parts = (option.error, option.pruning, option.weights, option.activations)
            times = (f"{option.nanoseconds / 1e3:,.1f}", format_bytes(option.nbytes), option.source)
            cells = (*(f"{part:.2g}" for part in parts), *times)  # type: ignore[assignment]
        rows.append((clean(table.name), f"{sensitivity:.2g}", label, *cells))
    return format_table(rows, width, {"layer", "chosen", "time by"})


def _options(advice: Advice, width: int) -> list[str]:
    rows = [("layer", "option", "zeros", "error", "pruning", "weights", "activations", "us", "bytes", "time by")]
    for table in advice.tables:
        for option in table.options:
            parts = (option.error, option.pruning, option.weights, option.activations)
            times = (f"{option.nanoseconds / 1e3:,.1f}", format_bytes(option.nbytes), option.source)
            shares = (f"{100 * option.sparsity:.0f} %", *(f"{part:.2g}" for part in parts))
            rows.append((clean(table.name), option.label, *shares, *times))  # type: ignore[arg-type]
    return format_table(rows, width, {"layer", "option", "time by"})


def _points(advice: Advice, width: int) -> list[str]:
    metrics = list(advice.float_metrics)
    heading = ("setting", "ms", "expected", "library", "noise", "cosine", *metrics, "drop", "")
    rows = [heading]
    best = front(advice.points, advice.counts)
    if metrics:
        values = [f"{value:.4f}" for value in advice.float_metrics.values()]
        rows.append(("the model itself", "", "", "", "0", "1.0000", *values, "0", ""))
    for point in sorted(advice.points, key=lambda point: cost_of(point, advice.counts)):
        outcome = point.outcome
        mark = "<- chosen" if point.chosen else "*" if point in best else ""
        rows.append(
            (
                clean(point.label),
                "" if outcome.milliseconds is None else f"{outcome.milliseconds:.3g}",
                "" if point.expected_ms is None else f"{point.expected_ms:.3g}",
                format_bytes(outcome.nbytes),
                f"{outcome.noise:.2g}",
                f"{outcome.cosine:.4f}",
                *(f"{outcome.metrics[name]:.4f}" for name in metrics),
                f"{point.drop:.2g}",
                mark,
            )
        )
    return [*format_table(rows, width, {"setting", ""}), f"* no other costs less {advice.counts} and loses less"]


def _prices(advice: Advice) -> list[str]:
    """What each step along the front costs: time and bytes for a hundredth of what is compared."""
    lines = []
    best = front(advice.points, advice.counts)
    for cheap, better in pairwise(best):
        gained = cheap.drop - better.drop
        if gained <= 0:
            continue
        costs = [f"{_more(better.outcome.nbytes - cheap.outcome.nbytes, gained)} bytes"]
        ms = [_milliseconds(point) for point in (cheap, better)]
        if ms[0] is not None and ms[1] is not None:
            costs.insert(0, f"{_more(ms[1] - ms[0], gained)} ms")
        lines.append(f"  {clean(cheap.label)} -> {clean(better.label)}: {' and '.join(costs)} for 0.01")
    return [f"what 0.01 ({advice.drop_unit}) costs:", *lines] if lines else []


def _more(cost: float, gained: float) -> str:
    return f"{cost / gained / 100:+,.3g}"


def _milliseconds(point: Point) -> float | None:
    return point.expected_ms if point.outcome.milliseconds is None else point.outcome.milliseconds


def _offenders(advice: Advice) -> list[str]:
    """The layers whose chosen option harms the outputs most, and the option that undoes most of it."""
    chosen = advice.chosen_options()
    harms: list[tuple[float, LayerTable, str]] = []
    for table, sensitivity in zip(advice.tables, advice.sensitivities, strict=True):
        option = next((option for option in table.options if option.label == chosen.get(table.name)), None)
        if option is not None:
            harms.append((sensitivity * option.error, table, option.label))
    worst = sorted(harms, key=lambda harm: -harm[0])[:_WORST]
    lines = [f"  {clean(table.name)}: {harm:.2g} by {label}{_undoing(table, label)}" for harm, table, label in worst]
    return ["worst offenders (their share of the noise at the outputs, about):", *lines] if lines else []


def _undoing(table: LayerTable, label: str) -> str:
    current = table.options[table.index(label)]
    parts = {
        "pruning": current.pruning,
        "weight rounding": max(0.0, current.weights - current.pruning),
        "activation rounding": current.activations,
    }
    source = max(parts, key=lambda part: parts[part])
    if source != "pruning":
        others = [option for option in table.options if option.dtype == "float32" and not option.prune]
    else:
        others = [option for option in table.options if option.error < current.error / 2 and option.dtype == "int8"]
    if not others or current.dtype == "float32":
        return f", mostly {source}"
    better = min(others, key=lambda option: option.nanoseconds)
    more = (better.nanoseconds - current.nanoseconds) / 1e3
    return f", mostly {source}: {better.label} brings {better.error:.2g} of {current.error:.2g} for {more:+,.1f} us"


def _training(advice: Advice) -> Sequence[str]:
    if not advice.training:
        return ()
    return [
        "",
        "pruning without training does not reach the budget at a drop of this size; these pruners train the zeros in, "
        "in your own training loop (docs/training.md):",
        *(f"  {line}" for line in advice.training),
    ]
