from itertools import combinations

import numpy as np
import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st
from network import Network, residual_network

from pumice.module import layers_of
from pumice.passes.calibrate import Calibrate
from pumice.passes.keep_float import choose_float, within_budget
from pumice.passes.layers import find_layers
from pumice.passes.quantization_plan import QuantizeSpec
from pumice.passes.quantize import Quantize
from pumice.passes.sparsity import RecordLayers


def test_most_noise_for_the_cost_first():
    noise = {"a": 1e-3, "b": 4e-3, "c": 2e-3, "d": 1e-6}
    costs = {"a": 0.01, "b": 0.5, "c": 0.03, "d": 0.0001}
    assert list(choose_float(noise, costs, 0.05)) == ["c", "a"]  # b does not fit, d does no harm
    assert list(choose_float(noise, costs, 1.0)) == ["b", "c", "a"]
    assert choose_float(noise, costs, 0.0) == {}
    assert choose_float(noise, costs, 0.01)["a"].startswith(
        "kept float by the budget: in int8 its noise is -30.0 dB of the outputs', number 3 of 4 layers"
    )


@for_all(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=1, max_size=7), st.floats(0, 3))
def test_greed_misses_the_optimum_by_less_than_one_layer(layers, budget):
    noise = {str(i): n for i, (n, _) in enumerate(layers)}
    costs = {str(i): c for i, (_, c) in enumerate(layers)}
    chosen = choose_float(noise, costs, budget)
    assert sum(costs[name] for name in chosen) <= budget * (1 + 1e-6)
    every = [c for size in range(len(layers) + 1) for c in combinations(noise, size)]
    best = max(sum(noise[n] for n in c) for c in every if sum(costs[n] for n in c) <= budget)
    harmless = 0.005 * sum(noise.values()) * len(noise)
    assert sum(noise[name] for name in chosen) >= best - max(noise.values()) - harmless


def test_the_plan_follows_and_gives_the_reason():
    mod = RecordLayers()(residual_network())
    samples = {"image": np.random.default_rng(0).normal(0, 1, (4, 4, 12, 12)).astype(np.float32)}
    spec = within_budget(mod, samples, 0.1, QuantizeSpec(("b0",)))
    assert spec.reasons and spec.keep_float == ("b0",) and "b0" not in spec.reasons
    records = layers_of(Quantize(spec)(Calibrate(samples, "minmax", spec)(mod)))
    total = sum(layer.macs for layer in find_layers(mod))
    kept = [name for name, record in records.items() if record.reason.startswith("kept float by the budget")]
    assert set(kept) == set(spec.reasons)
    assert sum(records[name].macs for name in kept) <= 0.1 * total
    assert all(records[name].dtype == "float32" for name in [*kept, "b0"])
    assert all(records[name].dtype == "int8" for name in set(records) - {*kept, "b0"})


@pytest.mark.parametrize("budget", [0.0, -1.0])
def test_no_budget_changes_nothing(budget):
    spec = QuantizeSpec(("fc",))
    assert within_budget(residual_network(), {}, budget, spec) is spec


def test_layers_that_share_a_weight_are_paid_for_together():
    """Half of the work is one weight, read twice: neither reader fits into a budget that has room for one."""
    net = Network(2)
    shared = net.weight("shared", net.rng.normal(0, 0.3, (16, 16)).astype(np.float32))
    x = net.relu("r0", net.linear("first", net.input("x", (1, 16)), 16))
    x = net.relu("r1", net.linear("once", x, 16, weight=shared))
    x = net.relu("r2", net.linear("twice", x, 16, weight=shared))
    mod = RecordLayers()(net.finish(y=net.linear("last", x, 16)))
    samples = {"x": np.random.default_rng(0).normal(0, 1, (8, 16)).astype(np.float32)}
    for budget in (0.3, 0.5, 1.0):
        spec = within_budget(mod, samples, budget)
        records = layers_of(Quantize(spec)(Calibrate(samples, "minmax", spec)(mod)))
        kept = {name for name, record in records.items() if record.dtype == "float32"}
        assert len(kept) * 0.25 <= budget
        assert ("once" in kept) == ("twice" in kept)
