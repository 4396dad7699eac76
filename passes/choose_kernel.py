"""Sparse or dense: which form of a layer's weight is fastest on the target, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pumice.passes.layer_kernel import LayerWork, weight_in
from pumice.passes.layers import Layer
from pumice.passes.placement import expected_places
from pumice.schedules.blocks import QUAD, Blocks, count_blocks, expand_groups
from pumice.schedules.costs import break_even, costs_of, estimate, price_of_entry
from pumice.schedules.gemv import has_few_positions
from pumice.schedules.measurements import Measurements, format_time
from pumice.schedules.places import Places
from pumice.schedules.slices import Slices, slice_rows
from pumice.schedules.tiling import DENSE, FORMS, Candidate, Extent, Form, Tiling, tilings
from pumice.targets.isa import Isa

_WORTH_TRYING = 1.5  # times the least estimate
_MOST = 12  # candidates by the estimate
_MOST_DENSE = 4  # that are tried in any case: what sparse kernels are compared with must be good


@dataclass(frozen=True)
class Choice:
    """The weight in its chosen form, the kernel's name for the report, and the reason in a sentence.

    ``tiling`` is how the kernel walks a weight in blocks; ``stored`` its bytes where it is kept in yet another form.
    """

    weight: Blocks | Slices
    kernel: str
    reason: str
    tiling: Tiling | None = None
    stored: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as it is stored."""
        return self.weight.nbytes if self.stored is None else self.stored


def preview(layer: Layer, weight: np.ndarray, isa: Isa, threads: int = 1) -> Choice:
    """What would be chosen for a float ``weight`` once it is int8: what is zero now is zero then."""
    rows = (layer.to_rows(weight) != 0).astype(np.int8)
    groups = int(layer.call.attrs.groups) if layer.operator == "conv2d" else 1
    rows = expand_groups(rows, groups)
    return choose_form(rows, expected_places(layer), isa, threads)


@dataclass(eq=False)
class Chooser:
    """Chooses among ``forms``, by times that were ``measured`` if the layer has any, else by the cost table.

    ``where`` they were measured goes into the reasons.
    """

    forms: Sequence[Form] = FORMS
    measured: Measurements | None = None
    where: str = "here"

    def choose(self, work: LayerWork, isa: Isa) -> Choice:
        """The form and the tiling for a layer."""
        rows = work.numbers.rows
        times = self.measured.of(work.workload) if self.measured else {}
        times = {candidate: time for candidate, time in times.items() if candidate[0] in self.forms}
        if any(form.is_dense for form, _ in times):  # without it nobody knows what sparse is worth
            return _fastest_measured(work, times, isa, self.where)
        return choose_form(rows, work.places, isa, work.threads, self.forms)


def candidates(work: LayerWork, isa: Isa) -> list[Candidate]:
    """The kernels of a layer that are worth measuring: the best by the estimate, and the best dense ones."""
    rows = work.numbers.rows
    slices: list[Candidate] = [(DENSE, None), (Form(1), None)]
    if work.has_one_position:
        return slices
    extent = Extent.of(rows, work.places, isa)
    times = _estimates(rows, extent, isa, work.threads, wide=True)
    order = sorted(times, key=lambda candidate: times[candidate])
    good = [candidate for candidate in order if times[candidate] <= _WORTH_TRYING * times[order[0]]][:_MOST]
    dense = [candidate for candidate in order if candidate[0].is_dense][:_MOST_DENSE]
    return [*(slices if work.has_few_positions else []), *dict.fromkeys(good + dense)]


def choose_form(rows: np.ndarray, places: Places, isa: Isa, threads: int = 1, forms: Sequence[Form] = FORMS) -> Choice:
    """The form of ``rows`` ``[N, taps, C]`` (int8 or float32) by the cost table: in slices, where few positions pay."""
    if isa.is_gpu or not has_few_positions(places):
        return choose_blocks(rows, places, isa, threads, forms)
    positions = places.target.span
    slices = choose_slices(rows, isa, forms, positions)
    if positions == 1:
        return slices
    price = price_of_entry(slices.weight.is_dense, positions, costs_of(isa.name, str(rows.dtype)))
    estimates = _estimates(rows, Extent.of(rows, places, isa), isa, threads)
    if slices.weight.work * price < min(time for (form, _), time in estimates.items() if form in forms):
        return slices
    return choose_blocks(rows, places, isa, threads, forms)


def choose_blocks(
    rows: np.ndarray, places: Places, isa: Isa, threads: int = 1, forms: Sequence[Form] = FORMS
) -> Choice:
    """The form and the tiling of ``rows`` ``[N, taps, C]`` (int8 or float32) for a layer with many positions."""
    extent = Extent.of(rows, places, isa)
    times = _estimates(rows, extent, isa, threads)
    best = min((candidate for candidate in times if candidate[0] in forms), key=lambda candidate: times[candidate])
    dtype, depth, form = str(rows.dtype), _depth(rows), best[0]
    zeros = 1 - _left(rows, 1)
    limit = break_even(extent, isa, threads, costs_of(isa.name, dtype))
    weight, kernel = weight_in(rows, best, isa, places), f"{form.describe(depth)} {dtype} {isa.name}"
    if form.is_dense:
        return Choice(weight, kernel, _dense_reason(zeros, limit, depth), best[1])
    dense = min(time for candidate, time in times.items() if candidate[0].is_dense)
    reason = f"{zeros:.0%} of its 1x{depth} blocks are zero and sparse breaks even at {limit:.0%} here: "
    if form.shared > 1:
        reason += f"{_left(rows, form.shared):.0%} of the {form.shared}x{depth} blocks are left, "
    ratio = dense / max(times[best], 1e-9)
    if isa.is_gpu:  # nothing was measured
        reason += f"dense takes {ratio:.1f} times as many instructions"
    else:
        reason += f"{ratio:.1f} times as fast as dense by the cost table"
    return Choice(weight, kernel, reason, best[1])


def choose_slices(rows: np.ndarray, isa: Isa, forms: Sequence[Form] = FORMS, positions: int = 1) -> Choice:
    """The form of ``rows`` ``[N, 1, C]`` in slices, for a layer with few positions."""
    costs = costs_of(isa.name, str(rows.dtype))
    label, depth = f"{rows.dtype} {isa.name}", _depth(rows)
    zeros = 1 - _left(rows, 1)
    limit = price_of_entry(True, positions, costs) / price_of_entry(False, positions, costs)
    dense = slice_rows(rows, isa, False, positions)
    if Form(1) not in forms or (DENSE in forms and 1 - zeros >= limit):  # it would not pay even without padding
        return Choice(dense, f"gemv dense {label}", _dense_reason(zeros, 1 - limit, depth))
    sparse = slice_rows(rows, isa, True, positions)
    left = sparse.work / dense.work
    reason = f"{zeros:.0%} of its 1x{depth} blocks are zero: sparse pays below {limit:.0%} of the entries here, and "
    if DENSE not in forms or left < limit:
        reason += f"{left:.0%} are left, padding included"
        return Choice(sparse, f"gemv sparse 1x{depth} {label}", reason)
    reason += f"{left:.0%} would be left, padding included: dense"
    return Choice(dense, f"gemv dense {label}", reason)


def estimated_time(work: LayerWork, choice: Choice, isa: Isa) -> float:
    """Nanoseconds of the chosen kernel by the cost table, its work shared out evenly among the threads."""
    rows, weight, costs = work.numbers.rows, choice.weight, costs_of(isa.name, work.numbers.dtype)
    if isinstance(weight, Slices):
        return weight.work * price_of_entry(weight.is_dense, work.places.target.span, costs) / work.threads
    assert choice.tiling is not None
    form = DENSE if weight.is_dense else Form(weight.shared)
    extent = Extent.of(rows, work.places, isa)
    return estimate(extent, form, len(weight.data), choice.tiling, costs) / work.threads


def _fastest_measured(work: LayerWork, times: Mapping[Candidate, float], isa: Isa, where: str) -> Choice:
    """The fastest of what was measured; the reason has the time of the best kernel of each form."""
    rows, depth = work.numbers.rows, work.depth
    by_form: dict[Form, float] = {}
    for (form, _), time in sorted(times.items(), key=lambda item: item[1]):
        by_form.setdefault(form, time)
    form, tiling = best = min(times, key=lambda candidate: times[candidate])
    kind = f"{'gemv ' if tiling is None else ''}{form.describe(depth)}"
    found = ", ".join(f"{form.describe(depth)} {format_time(time)}" for form, time in by_form.items())
    reason = f"{1 - _left(rows, 1):.0%} of its 1x{depth} blocks are zero; measured {where}: {found}"
    return Choice(weight_in(rows, best, isa, work.places), f"{kind} {rows.dtype} {isa.name}", reason, tiling)


def _estimates(
    rows: np.ndarray, extent: Extent, isa: Isa, threads: int, wide: bool = False
) -> dict[tuple[Form, Tiling], float]:
    """Nanoseconds of all candidates by the cost table."""
    costs, total = costs_of(isa.name, str(rows.dtype)), extent.rows * extent.words * extent.taps
    times = {}
    for form in FORMS:
        entries = total // QUAD if form.is_dense else count_blocks(rows, form.shared)
        for tiling in tilings(extent, form, isa, threads, wide):
            times[form, tiling] = estimate(extent, form, entries, tiling, costs)
    return times


def _depth(rows: np.ndarray) -> int:
    """Input channels in a word."""
    return 4 if rows.dtype == np.int8 else 1


def _left(rows: np.ndarray, shared: int) -> float:
    """The share of blocks that are not zero, ``shared`` rows together."""
    n, taps, c = rows.shape
    lists = n if shared == 1 else -(-n // QUAD) * QUAD // shared
    return count_blocks(rows, shared) / float(lists * taps * -(-c // _depth(rows)))


def _dense_reason(zeros: float, limit: float, depth: int) -> str:
    kind = f"of its 1x{depth} blocks" if depth > 1 else "of its weights"
    if zeros < 0.001:
        return f"none {kind} is zero"
    return f"breaks even at {limit:.0%} zeros here, and {zeros:.0%} {kind} are zero: dense"
