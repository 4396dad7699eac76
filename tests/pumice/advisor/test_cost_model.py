"""What a network takes by what its layers take: sums that can be done by hand."""

import numpy as np
import pytest

from pumice.advisor.cost_model import CostModel, dense_choice
from pumice.advisor.layer_options import DATABASE, ESTIMATED, LayerOption, LayerTable
from pumice.patterns import Pattern

BLOCKS, TWO_OF_FOUR = Pattern.parse("1x4"), Pattern.parse("2:4")


def option(prune, nanoseconds, nbytes=0, dtype="int8", source=ESTIMATED):
    return LayerOption(prune, dtype, 0.0, 0.0, 0.0, 0.0, nanoseconds, source, nbytes)


def table(name, *options):
    return LayerTable(name, (name,), f"{name}.weight", options)


FIRST = table(
    "first",
    option("magnitude:1x4:0.5", 60, 600),
    option("magnitude:1x4:0.9", 20, 200),
    option("", 100, 1000),
    option("", 400, 4000, "float32"),
)
SECOND = table("second", option("magnitude:2:4", 30, 50), option("", 50, 100), option("", 200, 400, "float32"))


def test_bytes_are_a_sum_and_what_no_layer_holds():
    model = CostModel.of_size([FIRST, SECOND], 1500)
    assert (model.dense, model.rest, model.least) == (1500, 400, 400 + 200 + 50)
    assert model.whole((0, 2)) == 400 + 600 + 400
    assert dense_choice([FIRST, SECOND]) == (2, 1)


def test_estimated_times_are_scaled_to_what_dense_layers_took():
    """150 were estimated and 300 measured, of 500 in all: every estimate counts twice, and 200 are between layers."""
    model = CostModel.of_time([FIRST, SECOND], whole=500, layers=300)
    assert (model.rest, model.dense) == (pytest.approx(200), pytest.approx(500))
    assert model.whole((1, 0)) == pytest.approx(200 + 2 * 20 + 2 * 30)


def test_measured_times_are_not_scaled():
    """Of 300 that dense layers took 50 are known, so the estimate of 100 counts 2.5 times."""
    known = table("second", option("magnitude:2:4", 30, source=DATABASE), option("", 50, source=DATABASE))
    model = CostModel.of_time([FIRST, known], whole=310, layers=300)
    assert model.costs[1].tolist() == [30, 50]
    assert model.costs[0].tolist() == pytest.approx([150, 50, 250, 1000])
    assert model.rest == pytest.approx(10)


def test_without_a_measurement_times_are_as_they_are_estimated():
    model = CostModel.of_time([FIRST, SECOND])
    assert (model.rest, model.dense, model.least) == (0, 150, 50)


def test_a_uniform_amount_lies_between_levels():
    model = CostModel.of_time([FIRST, SECOND])
    # What the second layer cannot be pruned by leaves it dense.
    assert model.uniform("magnitude", BLOCKS, 0.5) == 60 + 50
    assert model.uniform("magnitude", BLOCKS, 0.7) == pytest.approx(40 + 50)
    assert model.uniform("magnitude", BLOCKS, 0.25) == pytest.approx(80 + 50)
    assert model.uniform("magnitude", TWO_OF_FOUR, 0.5) == 100 + 30
    assert model.uniform_amount("magnitude", BLOCKS, 90) == 0.7
    assert model.uniform_amount("magnitude", BLOCKS, 150) == 0
    assert model.uniform_amount("magnitude", BLOCKS, 69) is None
    assert model.uniform_amount("magnitude", TWO_OF_FOUR, 130) == 0.5
    assert model.uniform_amount("magnitude", TWO_OF_FOUR, 129) is None
    assert model.uniform_amount("wanda", BLOCKS, 149) is None


def test_the_least_is_the_least_of_all_choices():
    model = CostModel.of_size([FIRST, SECOND], 1100)
    sizes = [len(each.options) for each in (FIRST, SECOND)]
    assert model.least == min(model.whole(tuple(choice)) for choice in np.ndindex(*sizes))


def test_estimates_stay_where_known_layers_took_more_than_all_of_them_did():
    known = table("second", option("magnitude:2:4", 30, source=DATABASE), option("", 50, source=DATABASE))
    model = CostModel.of_time([FIRST, known], whole=60, layers=45)
    assert model.costs[0].tolist() == [60, 20, 100, 400]
