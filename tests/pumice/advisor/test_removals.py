"""Which filters and heads an advisor may take out, and how much of them a budget asks for."""

import pytest
from tiny import tiny_onnx

from pumice.advisor.removals import can_remove, ladders
from pumice.advisor.uniform import _amounts
from pumice.errors import UsageError
from pumice.frontend import read_model
from pumice.passes import SimplifyModel
from pumice.passes.prune_spec import parse_prune


def test_ladders_go_from_the_least_to_the_most():
    found = ladders(["filters:0.5", "heads:0.25", "filters:0.125:by=l2"])
    assert {method: list(map(str, specs)) for method, specs in found.items()} == {
        "filters": ["filters:0.125:by=l2", "filters:0.5"],
        "heads": ["heads:0.25"],
    }


def test_what_makes_zeros_is_no_removal():
    with pytest.raises(UsageError, match="removes none; give filters:AMOUNT"):
        ladders(["filters:0.5", "wanda:1x4:0.5"])


@pytest.mark.parametrize(("spec", "possible"), [("filters:0.25", True), ("heads:0.25", False)])
def test_a_network_without_attention_has_no_heads(spec, possible):
    mod = SimplifyModel()(read_model(tiny_onnx(batch=1), None))
    assert can_remove(mod, parse_prune(spec)) is possible


@pytest.mark.parametrize("limit", [32.0, 59.0, 91.0])
def test_amounts_come_to_what_keeps_the_limit(limit):
    """Half of the channels are a quarter of the work between two layers, and half of it at the ends."""
    known = {0.0: 100.0}
    for amount in _amounts(known, limit):
        known[amount] = 100 * (0.8 * (1 - amount) ** 2 + 0.2 * (1 - amount))
        if 0.96 * limit <= known[amount] <= limit:
            return
    raise AssertionError(f"{limit} is never used up: {known}")


def test_what_cannot_be_reached_ends():
    known = {0.0: 100.0}
    for amount in _amounts(known, 10.0):
        known[amount] = 100 - 20 * amount
    assert max(known) == 0.9 and len(known) <= 6
