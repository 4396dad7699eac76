from itertools import product

import numpy as np
import pytest

from pumice.passes.allocate import allocate
from pumice.passes.prune_rows import prune_rows
from pumice.passes.prune_spec import Magnitude, SparseGPT, Wanda
from pumice.passes.statistics import Moments, output_error
from pumice.patterns import Pattern

BLOCK = Pattern(1, 4)


def layers(seed=0):
    draw = np.random.default_rng(seed)
    shapes = {"wide": (32, 1, 64), "small": (8, 9, 8), "thin": (4, 1, 8)}
    rows = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    moments = {}
    for name, (_, taps, c) in shapes.items():
        inputs = draw.standard_normal((200, taps * c)) * np.exp(draw.standard_normal(taps * c))
        moments[name] = Moments((inputs.T @ inputs / 200)[None], inputs.mean(0)[None], 200)
    return rows, moments


def overall(amounts, rows, pattern):
    counts = {name: pattern.unit_scores(array).size for name, array in rows.items()}
    return sum(amounts[name] * counts[name] for name in rows) / sum(counts.values())


@pytest.mark.parametrize("allocation", ["uniform", "global", "erk", "sensitivity"])
@pytest.mark.parametrize("amount", [0.0, 0.3, 0.77, 1.0])
def test_the_network_loses_as_much_as_asked(allocation, amount):
    rows, moments = layers()
    amounts = allocate(Wanda(BLOCK, amount, allocation), rows, moments)
    assert all(0 <= share <= 1 for share in amounts.values())
    assert overall(amounts, rows, BLOCK) == pytest.approx(amount, abs=1e-3)


def test_uniform_is_the_same_everywhere():
    rows, _ = layers()
    assert allocate(Magnitude(BLOCK, 0.6), rows, {}) == dict.fromkeys(rows, 0.6)


def test_global_is_one_ranking():
    rows, _ = layers()
    rows["thin"] *= 100
    amounts = allocate(Magnitude(BLOCK, 0.5, "global"), rows, {})
    assert amounts["thin"] == 0
    sizes = np.concatenate([np.abs(array).reshape(-1, 4).sum(1) for array in (rows["wide"], rows["small"])])
    limit = np.sort(sizes)[round(0.5 * (sizes.size + 8)) - 1]
    assert amounts["wide"] == np.mean(np.abs(rows["wide"]).reshape(-1, 4).sum(1) <= limit)


def test_erk_is_the_paper_s_formula():
    """Density in proportion to (out + in + kernel height + width) / weights, narrow layers dense."""
    rows, _ = layers()
    amounts = allocate(Magnitude(Pattern(), 0.8, "erk"), rows, {})
    raw = {"wide": (32 + 64) / 2048, "small": (8 + 8 + 3 + 3) / 576, "thin": (4 + 8) / 32}
    assert amounts["thin"] == 0
    left = 0.2 * (2048 + 576 + 32) - 32
    factor = left / (raw["wide"] * 2048 + raw["small"] * 576)
    assert 1 - amounts["wide"] == pytest.approx(factor * raw["wide"])
    assert 1 - amounts["small"] == pytest.approx(factor * raw["small"])


@pytest.mark.parametrize("spec", [Magnitude(BLOCK, 0.5, "sensitivity"), SparseGPT(BLOCK, 0.5, "sensitivity")])
def test_sensitivity_loses_least_of_all_ways_to_spread(spec):
    """Against all shares in tenths of three layers that together reach the amount."""
    rows, moments = layers(2)
    method = Wanda(BLOCK, 0.5, "global") if isinstance(spec, SparseGPT) else spec

    def error(amounts):
        return sum(
            output_error(rows[name], prune_rows(rows[name], method, share, moments[name]), moments[name])
            for name, share in amounts.items()
        )

    grid = [dict(zip(rows, shares, strict=True)) for shares in product(np.linspace(0, 1, 11), repeat=3)]
    best = min(error(amounts) for amounts in grid if overall(amounts, rows, BLOCK) >= 0.5)
    found = allocate(spec, rows, moments)
    assert error(found) <= 1.05 * best
    assert error(found) < error(dict.fromkeys(rows, 0.5))


def test_a_network_without_layers_has_no_shares():
    assert allocate(Magnitude(BLOCK, 0.5, "global"), {}, {}) == {}
