"""What a network takes, in time or bytes, by what its layers take: the sum, and a rest that no choice changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pumice.advisor.allocation import Choice
from pumice.advisor.layer_options import ESTIMATED, LayerTable
from pumice.passes.prune_spec import parse_prune
from pumice.patterns import Pattern

_FINEST = 100  # amounts of a uniform setting are multiples of a hundredth


@dataclass(frozen=True, eq=False)
class CostModel:
    """``costs[l][o]`` of each option of each table, and the ``rest``; nanoseconds or bytes."""

    tables: tuple[LayerTable, ...]
    costs: tuple[np.ndarray, ...]
    rest: float

    @classmethod
    def of_size(cls, tables: Sequence[LayerTable], dense: float) -> CostModel:
        """Bytes; a library of dense int8 layers takes ``dense``."""
        costs = [np.array([float(option.nbytes) for option in table.options]) for table in tables]
        return cls(tuple(tables), tuple(costs), max(0.0, dense - _dense(tables, costs)))

    @classmethod
    def of_time(cls, tables: Sequence[LayerTable], whole: float = 0.0, layers: float = 0.0) -> CostModel:
        """Nanoseconds. Where the dense network was timed, it took ``whole``, these ``layers`` of it together.

        Then times of the cost table are scaled by what it was wrong by; times that were measured are not.
        """
        raw = [np.array([option.nanoseconds for option in table.options]) for table in tables]
        estimated = _dense(
            tables,
            [cost * [option.source == ESTIMATED for option in t.options] for t, cost in zip(tables, raw, strict=True)],
        )
        known = _dense(tables, raw) - estimated
        # Where what is known takes up all that was measured already, estimates are as right as they were.
        scale = (layers - known) / estimated if estimated and layers > known else 1.0
        costs = [
            np.array([option.nanoseconds * (scale if option.source == ESTIMATED else 1.0) for option in table.options])
            for table in tables
        ]
        return cls(tuple(tables), tuple(costs), max(0.0, whole - _dense(tables, costs)))

    @property
    def least(self) -> float:
        """What the cheapest choice takes."""
        return self.rest + float(sum(cost.min() for cost in self.costs))

    @property
    def dense(self) -> float:
        """What dense int8 takes."""
        return self.whole(dense_choice(self.tables))

    def whole(self, choice: Choice) -> float:
        """What a choice takes."""
        return self.rest + float(sum(cost[option] for cost, option in zip(self.costs, choice, strict=True)))

    def uniform(self, technique: str, pattern: Pattern, amount: float) -> float:
        """What every layer pruned alike takes, between levels by interpolation; one that cannot be is dense."""
        total = self.rest
        for table, cost in zip(self.tables, self.costs, strict=True):
            levels = {0.0: float(cost[table.dense()])} if pattern.amount is None else {}
            for option, taken in zip(table.options, cost, strict=True):
                spec = parse_prune(option.prune) if option.prune else None
                if spec and spec.method == technique and getattr(spec, "pattern", None) == pattern:
                    levels[float(getattr(spec, "amount", 0.0))] = float(taken)
            levels = levels or {0.0: float(cost[table.dense()])}
            amounts = sorted(levels)
            total += float(np.interp(amount, amounts, [levels[one] for one in amounts]))
        return total

    def uniform_amount(self, technique: str, pattern: Pattern, limit: float) -> float | None:
        """The least amount with which every layer pruned alike takes no more than ``limit``; None if none does."""
        if pattern.amount is not None:
            return pattern.amount if self.uniform(technique, pattern, pattern.amount) <= limit else None
        levels = {
            float(getattr(parse_prune(option.prune), "amount", 0.0))
            for table in self.tables
            for option in table.options
            if option.prune.startswith(f"{technique}:{pattern}:")
        }
        for hundredths in range(round(_FINEST * max(levels, default=0.0)) + 1):
            if self.uniform(technique, pattern, hundredths / _FINEST) <= limit:
                return hundredths / _FINEST
        return None


def dense_choice(tables: Sequence[LayerTable]) -> Choice:
    """Every layer dense, in int8 where it can be."""
    return tuple(table.dense() for table in tables)


def _dense(tables: Sequence[LayerTable], costs: Sequence[np.ndarray]) -> float:
    return float(sum(cost[option] for cost, option in zip(costs, dense_choice(tables), strict=True)))
