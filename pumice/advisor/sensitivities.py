"""What a layer's error does to the network: a look at each layer alone, then the search of SPDY around that."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from pumice.advisor.allocation import Choice, Found, Problem, search_sensitivities
from pumice.advisor.cost_model import dense_choice
from pumice.advisor.layer_options import LayerTable

_TELLING = 0.1  # noise over signal of a layer, about, at which what it does to the network is looked at
_LEAST = 1e-3  # of the median sensitivity: noise of rounding hides what is less

Noise = Callable[[Choice], float]
Tell = Callable[[str], None]


def look_at_each(tables: Sequence[LayerTable], noise: Noise, may_go_on: Callable[[], bool], tell: Tell) -> np.ndarray:
    """The sensitivity of each layer: noise of the network's outputs, with it alone pruned, over the layer's own.

    ``noise`` gives the noise over signal of the outputs for a choice. A layer that there was no time for has the
    median of the others, and 1 where there was none for any.
    """
    dense = dense_choice(tables)
    floor = noise(dense)
    found = np.full(len(tables), np.nan)
    start = time.monotonic()
    for number, table in enumerate(tables):
        if not may_go_on():
            tell(f"no time was left to look at {len(tables) - number} of {len(tables)} layers alone")
            break
        option = telling_option(table)
        more = table.options[option].error - table.options[dense[number]].error
        if more <= 0:
            continue
        choice = (*dense[:number], option, *dense[number + 1 :])
        found[number] = max(0.0, noise(choice) - floor) / more
        left = (time.monotonic() - start) / (number + 1) * (len(tables) - number - 1)
        tell(
            f"{number + 1}/{len(tables)} {table.name}: {table.options[option].label} alone turns an error of "
            f"{table.options[option].error:.3g} into {found[number] * more:.3g} at the outputs, {format_left(left)}"
        )
    seen = found[np.isfinite(found) & (found > 0)]
    median = float(np.median(seen)) if len(seen) else 1.0
    return np.maximum(np.where(np.isfinite(found), found, median), _LEAST * median)


def telling_option(table: LayerTable) -> int:
    """The pruned option whose error is nearest to one that can be told from rounding and still adds up; else dense."""
    pruned = [i for i, option in enumerate(table.options) if option.prune and option.error > 0]
    if not pruned:
        return table.dense()
    return min(pruned, key=lambda i: abs(np.log(table.options[i].error / _TELLING)))


def search(
    problem: Problem,
    spare: float,
    noise: Noise,
    start: np.ndarray,
    trials: int,
    may_go_on: Callable[[], bool],
    tell: Tell,
) -> Found:
    """``search_sensitivities``, telling of each trial."""
    begin, done, least = time.monotonic(), 0, float("inf")

    def score(choice: Choice) -> float:
        nonlocal done, least
        found = noise(choice)
        done, least = done + 1, min(least, found)
        left = (time.monotonic() - begin) / done * (trials - done)
        tell(f"trial {done}/{trials}: noise {found:.4g} at the outputs, best {least:.4g}, {format_left(left)}")
        return found

    return search_sensitivities(problem, spare, score, trials, start, may_go_on=may_go_on)


def format_left(seconds: float) -> str:
    """``about 3 min left``."""
    return f"about {seconds:.0f} s left" if seconds < 60 else f"about {seconds / 60:.0f} min left"
