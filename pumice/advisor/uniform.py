"""Uniform settings, against which an allocation has to prove itself: one technique, the same amount of it everywhere.

Of each there is as much as keeps to a limit and uses it up: first by the model of costs, then by what it took.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil, sqrt

from pumice.advisor.advice import Point
from pumice.advisor.ledger import Ledger
from pumice.advisor.start import USED_UP, Start, carry_out_dense
from pumice.advisor.subjects import Space, spec_of
from pumice.passes.prune_spec import PruneSpec
from pumice.patterns import Pattern

_ATTEMPTS = 6  # amounts of filters or heads that are tried
_MOST = 0.9  # of them
_FINEST = 100  # amounts are multiples of a hundredth


class UniformSettings:
    """Carries out uniform settings of the whole network."""

    def __init__(self, whole: Start, ledger: Ledger, space: Space, removals: Sequence[PruneSpec]) -> None:
        """``removals``: one for each method, of any amount. ``remarks`` will say which settings do not get so far."""
        self._whole, self._ledger, self._space, self._removals = whole, ledger, space, removals
        self.remarks: list[str] = []

    def carry_out(self, limit: float, expected: float) -> None:
        """Every technique, pattern and removal; ``expected``: what the model of costs expects of the limit."""
        with self._whole.ground.stage("carry out uniform settings that cost as much"):
            for technique in self._space.techniques:
                for pattern in self._space.parsed:
                    point = self._zeros(technique, pattern, expected)
                    if point is not None and not self._uses_up(point, limit):
                        asked = self._expected(point) * limit / self._ledger.taken(point)
                        self._zeros(technique, pattern, asked)
        for spec in self._removals:
            self._removal(spec, limit)

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
        for amount in amounts(known, limit):
            removal = replace(spec, amount=amount)  # type: ignore[call-arg]
            point = carry_out_dense(self._whole.ground, self._ledger, (removal,))
            known[amount] = self._ledger.taken(point)
            if self._uses_up(point, limit):
                return
        if min(known.values()) > limit:
            self.remarks.append(f"uniform {spec.method} does not get so far with up to {max(known):.0%} of them")


def amounts(known: dict[float, float], limit: float) -> Iterator[float]:
    """Amounts to try, each after the one before has been entered into ``known``: what each amount takes.

    By a line between the most that takes too much and the least that does not; whenever that has just moved the same
    end again, in the middle, as channels go by fours and heads one by one: many amounts are the same network.
    """
    tried: list[float] = []
    for _ in range(_ATTEMPTS):
        over = max((amount for amount, taken in known.items() if taken > limit), default=0.0)
        under = min((amount for amount, taken in known.items() if taken <= limit and amount > over), default=_MOST)
        guess = 1 - limit / known[0.0] if under not in known and not over else _between(known, over, under, limit)
        moved = [known[amount] > limit for amount in tried[-2:]]
        if len(moved) == 2 and moved[0] == moved[1]:
            guess = (over + under) / 2
        first = round(_FINEST * over) + 1
        last = round(_FINEST * under) - (under in known)
        if first > last:
            return
        amount = min(last, max(first, ceil(_FINEST * guess - 1e-9))) / _FINEST
        tried.append(amount)
        yield amount


def _between(known: dict[float, float], over: float, under: float, limit: float) -> float:
    """Where a line meets the limit; beyond what is known, the line from 0 on.

    It is a line of roots: of layers with fewer channels on both sides the work is the product.
    """
    first, last = (over, under) if under in known else (0.0, over)
    start, end = sqrt(known[first]), sqrt(known[last])
    return first + (sqrt(limit) - start) / (end - start) * (last - first) if end < start else under
