"""Uniform settings, against which an allocation has to prove itself: one technique, the same amount of it everywhere.

Of each there is as much as keeps to a limit and uses it up: first by the model of costs, then by what it took.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil, sqrt

import numpy as np

from pumice.advisor.advice import Point
from pumice.advisor.ledger import Ledger
from pumice.advisor.removals import can_remove, ladders
from pumice.advisor.start import USED_UP, Start, carry_out_dense
from pumice.advisor.subjects import Space, spec_of
from pumice.passes.prune_spec import PruneSpec
from pumice.patterns import Pattern

_ATTEMPTS = 5  # amounts of filters or heads that are tried
_MOST = 0.9  # of them
_FINEST = 100  # amounts are multiples of a hundredth


class UniformSettings:
    """Carries out uniform settings of the whole network."""

    def __init__(self, whole: Start, ledger: Ledger, space: Space) -> None:
        """``remarks`` will say which settings do not get so far."""
        self._whole, self._ledger, self._space = whole, ledger, space
        self.remarks: list[str] = []

    def carry_out(self, limit: float, expected: float) -> None:
        """Every technique, pattern and removal; ``expected``: what the model of costs expects of the limit."""
        for technique in self._space.techniques:
            for pattern in self._space.parsed:
                point = self._zeros(technique, pattern, expected)
                if point is not None and not self._uses_up(point, limit):
                    asked = self._expected(point) * limit / self._ledger.taken(point)
                    self._zeros(technique, pattern, asked)
        for specs in ladders(self._space.removals).values():
            if can_remove(self._whole.ground.mod, specs[0]):
                self._removal(specs[0], limit)

    def _uses_up(self, point: Point, limit: float) -> bool:
        return USED_UP * limit <= self._ledger.taken(point) <= limit

    def _zeros(self, technique: str, pattern: Pattern, limit: float) -> Point | None:
        """With the least amount that is expected to take no more than the limit; None where none does."""
        amount = self._whole.costs.uniform_amount(technique, pattern, limit)
        if amount is None:
            self.remarks.append(f"uniform {technique}:{pattern} does not get so far at any level")
            return None
        spec = spec_of(technique, pattern, amount)
        recipe = self._whole.ground.base.pruning((spec,) if amount else ())
        taken = self._whole.time.uniform(technique, pattern, amount) / 1e6
        return self._ledger.carry_out(f"uniform {spec}", "uniform", recipe, taken)

    def _expected(self, point: Point) -> float:
        """What the model of costs expects of a point, or else what it took."""
        if self._ledger.counts == "time" and point.expected_ms is not None:
            return 1e6 * point.expected_ms
        return float(point.outcome.nbytes)

    def _removal(self, spec: PruneSpec, limit: float) -> None:
        """Ever another amount, by a line through what was taken, until the limit is kept and used up."""
        known = {0.0: self._ledger.taken(self._whole.dense)}
        for amount in _amounts(known, limit):
            removal = replace(spec, amount=amount)  # type: ignore[call-arg]
            point = carry_out_dense(self._whole.ground, self._ledger, (removal,))
            known[amount] = self._ledger.taken(point)
            if self._uses_up(point, limit):
                return
        if min(known.values()) > limit:
            self.remarks.append(f"uniform {spec.method} does not get so far")


def _amounts(known: dict[float, float], limit: float) -> Iterator[float]:
    """Amounts to try, each after the one before has been entered into ``known``: what each amount takes."""
    for attempt in range(_ATTEMPTS):
        amount = _guess(known, limit) if attempt else 1 - limit / known[0.0]
        amount = min(_MOST, max(1, ceil(_FINEST * amount)) / _FINEST)
        if amount in known:
            return
        yield amount


def _guess(known: dict[float, float], limit: float) -> float:
    """Where a line meets the limit: through the amounts around it, or beyond all that is known by 0 and the last.

    It is a line of roots, as between two layers that both have fewer channels the work is their product.
    """
    amounts, limit = sorted(known), sqrt(limit)
    # What takes more than less of it does is noise.
    takes = np.sqrt(np.minimum.accumulate([known[amount] for amount in amounts]))
    if takes[-1] <= limit:
        return float(np.interp(-limit, -takes, amounts))
    slope = float(takes[-1] - takes[0]) / amounts[-1]
    return amounts[-1] + (limit - float(takes[-1])) / slope if slope < 0 else _MOST
