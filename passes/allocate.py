"""How much of each layer goes: a share of all units, spread over the layers of a network."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pumice.passes.prune_rows import prune_rows, saliency
from pumice.passes.prune_spec import Magnitude, Surgeon, Wanda
from pumice.passes.statistics import Moments, output_error
from pumice.patterns import smallest

Spec = Magnitude | Wanda | Surgeon

_STEPS = 20  # shares at which a layer's sensitivity is looked at


def allocate(spec: Spec, rows: Mapping[str, np.ndarray], moments: Mapping[str, Moments]) -> dict[str, float]:
    """The share of units of each layer that is to be zero, by name; of all units together it is ``spec.amount``.

    ``rows`` are the layers' weights ``[N, taps, C]``. ``moments`` of their inputs are needed for ``sensitivity``, and
    for ``global`` by the methods that need them anyway.
    """
    if spec.allocation == "uniform" or not rows:
        return dict.fromkeys(rows, spec.amount)
    if spec.allocation == "global":
        return _globally(spec, rows, moments)
    counts = {name: _units(spec, array) for name, array in rows.items()}
    if spec.allocation == "erk":
        return _erdos_renyi_kernel(rows, counts, spec.amount)
    curves = {name: _curve(spec, array, moments[name]) for name, array in rows.items()}
    return _least_error(curves, counts, spec.amount)


def _units(spec: Spec, rows: np.ndarray) -> int:
    return spec.pattern.unit_scores(np.zeros(rows.shape, bool)).size


def _globally(spec: Spec, rows: Mapping[str, np.ndarray], moments: Mapping[str, Moments]) -> dict[str, float]:
    """One ranking of the units of all layers."""
    scores = [
        spec.pattern.unit_scores(saliency(array, spec, moments.get(name))).ravel() for name, array in rows.items()
    ]
    chosen = smallest(np.concatenate(scores), spec.amount)
    parts = np.split(chosen, np.cumsum([part.size for part in scores])[:-1])
    return {name: float(part.mean()) for name, part in zip(rows, parts, strict=True)}


def _erdos_renyi_kernel(rows: Mapping[str, np.ndarray], counts: Mapping[str, int], amount: float) -> dict[str, float]:
    """Density in proportion to (outputs + inputs + kernel sides) / weights, and no more than 1 (arXiv:1911.11134)."""
    density = {}
    for name, array in rows.items():
        outputs, taps, inputs = array.shape
        sides = 2 * np.sqrt(taps) if taps > 1 else 0  # kernels are squares, or nearly
        density[name] = (outputs + inputs + sides) / array.size
    dense: set[str] = set()
    left = (1 - amount) * sum(counts.values())
    while True:
        open_ones = [name for name in rows if name not in dense]
        room = left - sum(counts[name] for name in dense)
        factor = room / sum(density[name] * counts[name] for name in open_ones) if open_ones else 0.0
        full = {name for name in open_ones if factor * density[name] > 1}
        if not full:
            break
        dense |= full
    return {name: 0.0 if name in dense else 1 - max(0.0, factor * density[name]) for name in rows}


def _curve(spec: Spec, rows: np.ndarray, moments: Moments) -> np.ndarray:
    """The relative error of the layer's output at each share 0, 1/steps, ..., 1, made convex.

    By the method's own zeros, but without making up for them, which would take as long as pruning the network as often.
    """
    simple = Wanda(spec.pattern, spec.amount, "global") if isinstance(spec, Surgeon) else spec
    errors = [
        output_error(rows, prune_rows(rows, simple, share, moments), moments) for share in np.linspace(0, 1, _STEPS + 1)
    ]
    return _convex(np.maximum.accumulate(errors))


def _convex(curve: np.ndarray) -> np.ndarray:
    """The largest convex curve below: so that one price for all layers finds the best allocation."""
    hull: list[int] = []
    for i in range(len(curve)):
        while len(hull) > 1 and _slope(curve, hull[-2], hull[-1]) >= _slope(curve, hull[-2], i):
            hull.pop()
        hull.append(i)
    return np.asarray(np.interp(np.arange(len(curve)), hull, curve[hull]))


def _slope(curve: np.ndarray, a: int, b: int) -> float:
    return float(curve[b] - curve[a]) / (b - a)


def _least_error(curves: Mapping[str, np.ndarray], counts: Mapping[str, int], amount: float) -> dict[str, float]:
    """The shares with the least sum of errors: steps are taken in the order of their error for each unit."""
    steps = sorted(
        ((curve[i + 1] - curve[i]) / max(1, counts[name]), i, name)
        for name, curve in curves.items()
        for i in range(_STEPS)
    )
    missing = amount * sum(counts.values())
    shares = dict.fromkeys(curves, 0.0)
    for _, _, name in steps:
        taken = min(counts[name] / _STEPS, missing)
        shares[name] += taken / max(1, counts[name])
        missing -= taken
    return {name: min(1.0, share) for name, share in shares.items()}
