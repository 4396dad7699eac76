"""Which filters and heads an advisor may take out, and how much of them a budget asks for."""

import pytest
from tiny import tiny_onnx

from pumice.advisor.removals import ladders, possible_ladders
from pumice.advisor.uniform import amounts
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


@pytest.mark.parametrize("spec", ["wanda:1x4:0.5", "filters:0"])
def test_what_takes_nothing_out_is_no_removal(spec):
    with pytest.raises(UsageError, match="takes no filters or heads out; give filters:AMOUNT"):
        ladders(["filters:0.5", spec])


def test_a_network_without_attention_has_no_heads():
    mod = SimplifyModel()(read_model(tiny_onnx(batch=1), None))
    assert possible_ladders(mod, ["heads:0.5", "filters:0.25"]) == {"filters": [parse_prune("filters:0.25")]}


def test_a_layer_that_is_not_there_is_named():
    mod = SimplifyModel()(read_model(tiny_onnx(batch=1), None))
    with pytest.raises(UsageError, match="nowhere"):
        possible_ladders(mod, ["filters:0.25:keep=nowhere"])


@pytest.mark.parametrize("limit", [32.0, 59.0, 91.0])
def test_amounts_come_to_what_keeps_the_limit(limit):
    """Half of the channels are a quarter of the work between two layers, and half of it at the ends."""
    known = {0.0: 100.0}
    for amount in amounts(known, limit):
        known[amount] = 100 * (0.8 * (1 - amount) ** 2 + 0.2 * (1 - amount))
        if 0.96 * limit <= known[amount] <= limit:
            return
    raise AssertionError(f"{limit} is never used up: {known}")


@pytest.mark.parametrize("limit", [91.0, 75.0, 55.0])
def test_amounts_get_across_what_is_the_same_network(limit):
    """Twelve heads go one by one: amounts in between change nothing."""
    known = {0.0: 100.0}
    for amount in amounts(known, limit):
        known[amount] = 100 - 5 * round(12 * amount)
    best = max(taken for taken in known.values() if taken <= limit)
    assert limit - 5 < best <= limit


def test_what_cannot_be_reached_ends():
    known = {0.0: 100.0}
    for amount in amounts(known, 10.0):
        known[amount] = 100 - 20 * amount
    assert max(known) == 0.9 and len(known) <= 7


def test_a_transformer_has_both():
    transformer = pytest.importorskip("transformer")
    model = transformer.Encoder().eval()
    mod = SimplifyModel()(read_model(model, (transformer.torch.zeros(transformer.SHAPE),)))
    assert list(possible_ladders(mod, ["filters:0.25", "heads:0.25", "heads:0.5"])) == ["filters", "heads"]
