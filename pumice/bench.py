"""Timing one model on several engines so that the numbers can be compared.

Engines take turns within one run, so that a clock that changes or a neighbour on the machine hits all of them. A
turn is a slice of many calls, not one: an engine finds its weights in the cache as it would alone, and the first
calls of a slice, which bring them back, are not counted.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_SLICE_SECONDS = 0.04
_UNCOUNTED_SHARE = 0.25  # of a slice: caches, branch predictors and sleeping threads come back
_PAUSE_SECONDS = 0.01  # between slices: the threads of an engine spin for a while after its last call
_MIN_ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """One engine's times in milliseconds: the median of all counted calls and the spread."""

    name: str
    median: float
    p10: float
    p90: float
    calls: int
    ratio: float  # its time over the first engine's: the median over rounds of the ratio within a round

    def to_json(self) -> dict[str, Any]:
        """As the keys of ``--json``."""
        return {
            "name": self.name,
            "median_ms": self.median,
            "p10_ms": self.p10,
            "p90_ms": self.p90,
            "calls": self.calls,
            "ratio": self.ratio,
        }


@dataclass(frozen=True)
class Turn:
    """What an engine did in one turn: calls that do not count, then the times of those that do, in ms."""

    uncounted: int
    milliseconds: list[float]


def measure(engines: Mapping[str, Callable[[], Any]], seconds: float) -> list[Timing]:
    """Time each engine's call for about ``seconds`` in all; at least five rounds, however slow the calls."""
    turns = take_turns(engines, seconds)
    return summarize({name: [turn.milliseconds for turn in own if turn.milliseconds] for name, own in turns.items()})


def take_turns(engines: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, list[Turn]]:
    """Call the engines in turns; every call of each engine, in order. The first turn of each counts for nothing."""
    turns = {}
    for name, call in engines.items():
        warm_up = _slice(call)
        turns[name] = [Turn(warm_up.uncounted + len(warm_up.milliseconds), [])]
    order = list(engines)
    stop = time.perf_counter() + seconds
    collecting = gc.isenabled()
    gc.disable()
    try:
        while time.perf_counter() < stop or len(turns[order[0]]) <= _MIN_ROUNDS:
            for name in order:
                time.sleep(_PAUSE_SECONDS)
                turns[name].append(_slice(engines[name]))
            order.reverse()  # nobody always comes after the same neighbour
    finally:
        if collecting:
            gc.enable()
    return turns


def summarize(rounds: Mapping[str, list[list[float]]]) -> list[Timing]:
    """Medians, spread and ratios of the times in ms that each engine took in each round."""
    first = np.array([np.median(times) for times in rounds[next(iter(rounds))]])
    return [_timing(name, times, first) for name, times in rounds.items()]


def _slice(call: Callable[[], Any]) -> Turn:
    """One turn; at least one call counts."""
    start = time.perf_counter()
    counted: list[float] = []
    uncounted = 0
    while True:
        before = time.perf_counter()
        call()
        after = time.perf_counter()
        if before - start >= _SLICE_SECONDS * _UNCOUNTED_SHARE:
            counted.append(1e3 * (after - before))
        else:
            uncounted += 1
        if after - start >= _SLICE_SECONDS and counted:
            return Turn(uncounted, counted)


def _timing(name: str, rounds: list[list[float]], first: np.ndarray) -> Timing:
    everything = np.concatenate(rounds)
    p10, median, p90 = np.percentile(everything, [10, 50, 90])
    medians = np.array([np.median(times) for times in rounds])
    ratio = float(np.median(medians / first))
    return Timing(name, float(median), float(p10), float(p90), everything.size, ratio)
