"""Which option each layer takes under a budget: the dynamic programme of SPDY, and the search around it.

SPDY (Frantar and Alistarh, arXiv:2201.13096) spreads a time budget over layers. Each layer has options with a cost and
an error; the costs add up, and so, about, do the errors, each layer's times a sensitivity that nobody knows. For given
sensitivities a knapsack gives the best choice exactly; the sensitivities are searched for, each tried by the error
of the whole network that its choice leads to.

Nothing here knows what a layer is: costs and errors are arrays, a choice is one index a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

BUCKETS = 10_000  # that what a budget leaves above the cheapest choice is cut into
_WIDEST = 8.0  # a drawn sensitivity is at most so many times, or so much of, the one that it starts from
_CHANGED = 0.1  # of the sensitivities, in a step of the local search
_LEAST_CHANGED = 2  # one alone seldom leads to another choice: what one layer gives up, another must take
_REPEATS = 20  # attempts for each trial: most draws lead to a choice that was tried already

Choice = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Problem:
    """``costs[l][o]`` and ``errors[l][o]`` of option ``o`` of layer ``l``: float64, finite and not negative."""

    costs: Sequence[np.ndarray]
    errors: Sequence[np.ndarray]

    @property
    def least(self) -> float:
        """What the cheapest choice costs."""
        return float(sum(cost.min() for cost in self.costs))

    def cost(self, choice: Choice) -> float:
        """What a choice costs."""
        return float(sum(cost[option] for cost, option in zip(self.costs, choice, strict=True)))

    def error(self, choice: Choice) -> float:
        """The sum of a choice's errors."""
        return float(sum(error[option] for error, option in zip(self.errors, choice, strict=True)))

    def weighted(self, sensitivities: np.ndarray) -> Problem:
        """The same with each layer's errors times its sensitivity."""
        return Problem(self.costs, [s * error for s, error in zip(sensitivities, self.errors, strict=True)])


def allocate(problem: Problem, budget: float, buckets: int = BUCKETS) -> Choice | None:
    """The choice with the least sum of errors that costs no more than ``budget``; None where there is none.

    Costs above each layer's least are counted in ``buckets`` and rounded up, so that the budget is never exceeded. By
    that the choice is the best for some budget that is less than the given one by at most a bucket a layer.
    """
    spare = budget - problem.least
    if spare < 0:
        return None
    best = np.zeros(buckets + 1)  # of the layers so far, the least error for at most so many buckets
    picked = []
    for cost, error in zip(problem.costs, problem.errors, strict=True):
        total, pick = np.full(buckets + 1, np.inf), np.zeros(buckets + 1, np.intp)
        taken = _rounded_up(cost - cost.min(), spare, buckets)
        for option in np.argsort(cost, kind="stable"):
            first = taken[option]
            if first > buckets:
                break
            found = best[: buckets + 1 - first] + error[option]
            better = found < total[first:]
            total[first:][better] = found[better]
            pick[first:][better] = option
        best = total
        picked.append((pick, taken))
    return _trace_back(picked, buckets)


def _rounded_up(extra: np.ndarray, spare: float, buckets: int) -> np.ndarray:
    """Buckets that each cost above the least takes; more than there are where it does not fit."""
    fits = extra <= spare
    share = np.divide(extra * buckets, spare, out=np.zeros(len(extra)), where=fits & (extra > 0))
    return np.where(fits, np.ceil(share), buckets + 1).astype(np.intp)


def _trace_back(picked: Sequence[tuple[np.ndarray, np.ndarray]], left: int) -> Choice:
    choice = []
    for pick, taken in reversed(picked):
        option = int(pick[left])
        choice.append(option)
        left -= int(taken[option])
    return tuple(reversed(choice))


@dataclass(frozen=True, eq=False)
class Found:
    """What the search ended with.

    score: the real error of ``choice``; trials: how many choices were scored; scores: the best one after each
    """

    sensitivities: np.ndarray
    choice: Choice
    score: float
    trials: int
    scores: list[float] = field(default_factory=list)


def search_sensitivities(
    problem: Problem,
    budget: float,
    score: Callable[[Choice], float],
    trials: int,
    start: np.ndarray | None = None,
    seed: int = 0,
    may_go_on: Callable[[], bool] = lambda: True,
) -> Found:
    """The sensitivities whose choice under ``budget`` has the least ``score``, of at most ``trials`` choices.

    The first are ``start`` (all equal, if None), half are drawn around them at random, and the rest change a tenth of
    the best ones. A choice is scored once. ``may_go_on`` is asked before each further trial. ``seed`` fixes the draws.

    Raises ValueError where no choice fits the budget.
    """
    first = np.ones(len(problem.costs)) if start is None else np.asarray(start, np.float64)
    best_choice = allocate(problem.weighted(first), budget)
    if best_choice is None:
        raise ValueError(f"the cheapest choice costs {problem.least}, more than {budget}")
    draw = np.random.default_rng(seed)
    best, least = first, score(best_choice)
    scores, known = [least], {best_choice}
    for _ in range(_REPEATS * trials):
        if len(known) >= trials or not may_go_on():
            break
        drawn = _drawn_around(first, draw) if len(known) < trials / 2 else _partly_drawn(best, draw)
        choice = allocate(problem.weighted(drawn), budget)
        if choice is None or choice in known:
            continue
        known.add(choice)
        found = score(choice)
        if found < least:
            best, best_choice, least = drawn, choice, found
        scores.append(least)
    return Found(best, best_choice, least, len(known), scores)


def _drawn_around(first: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return np.asarray(first * _WIDEST ** draw.uniform(-1, 1, len(first)))


def _partly_drawn(best: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    changed = draw.permutation(len(best)) < max(_LEAST_CHANGED, round(_CHANGED * len(best)))
    return np.where(changed, _drawn_around(best, draw), best)


def reversals(problem: Problem, start: Choice) -> Iterator[Choice]:
    """``start``, then each choice after one more layer has an option of less error, until none has.

    The layer that comes next is the one whose error falls most for what that costs: so what harms most for the little
    that it saves goes first.
    """
    choice = list(start)
    yield tuple(choice)
    steps = [_next_step(problem, layer, option) for layer, option in enumerate(choice)]
    while any(steps):
        layer = max((i for i, step in enumerate(steps) if step), key=lambda i: _gain(steps[i]))
        step = steps[layer]
        assert step is not None
        choice[layer] = step[1]
        steps[layer] = _next_step(problem, layer, step[1])
        yield tuple(choice)


def _gain(step: tuple[float, int] | None) -> float:
    return -1.0 if step is None else step[0]


def _next_step(problem: Problem, layer: int, option: int) -> tuple[float, int] | None:
    """The option of a layer that takes most error away for its cost, and how much; None where none has less error."""
    cost, error = problem.costs[layer], problem.errors[layer]
    less = error[option] - error
    more = np.maximum(cost - cost[option], 1e-12 * max(1.0, float(cost.max())))
    gain = np.where(less > 0, less / more, -1.0)
    best = int(np.argmax(gain))
    return (float(gain[best]), best) if gain[best] > 0 else None
