"""The options of layers of a small network, against errors that are computed from the data themselves."""

from fnmatch import fnmatchcase

import numpy as np
import pytest
from network import Network
from running import run_compiled

from pumice.advisor.layer_options import LayerOption, layer_tables, options_of, quantized_rows
from pumice.advisor.stitching import Reference, Stitcher, glob_of, recipe_of
from pumice.advisor.subjects import Space, find_subjects
from pumice.module import weights_of, with_weights
from pumice.passes.calibrate import Calibrate
from pumice.passes.layers import find_layers
from pumice.passes.prune import Prune
from pumice.passes.quantization_plan import quantize_rows, symmetric_scale
from pumice.passes.quantize import Quantize
from pumice.passes.sparsity import RecordLayers
from pumice.recipe import Recipe
from pumice.targets.isa import isa
from pumice.targets.target import Target

SPACE = Space(techniques=("magnitude", "sparsegpt"), patterns=("1x4", "unstructured"), levels=(0.5, 0.75))
X = np.random.default_rng(3).standard_normal((64, 16)).astype(np.float32) @ np.diag(np.linspace(0.2, 2, 16))
SAMPLES = {"x": X.astype(np.float32)}


@pytest.fixture(scope="module")
def network():
    net = Network(seed=4)
    hidden = net.relu("relu", net.linear("first", net.input("x", (1, 16)), 24))
    return RecordLayers()(net.finish(y=net.linear("second", hidden, 8)))


@pytest.fixture(scope="module")
def calibrated(network):
    return Calibrate(SAMPLES, "minmax")(network)


@pytest.fixture(scope="module")
def subjects(network, calibrated):
    found, others = find_subjects(network, Quantize()(calibrated), SAMPLES, SPACE, Target.parse("native"), 1)
    assert not others
    return found


@pytest.fixture(scope="module")
def tables(subjects):
    return layer_tables(subjects, Target.parse("native"))


def ratio(x, before, after):
    """Noise over signal at the output of ``x @ w``."""
    return np.square(x @ (after - before).astype(np.float64)).sum() / np.square(x @ before.astype(np.float64)).sum()


def test_errors_are_those_at_the_layers_output(network, tables):
    """By zeros: exactly. By rounding weights: with the rounding written out here."""
    weight, (first, _) = weights_of(network)["first.weight"], tables
    assert [option.label for option in first.options][-2:] == ["int8", "float32"]
    assert len(first.options) == 2 * 2 * 2 + 2
    by_label = {option.label: option for option in first.options}
    for spec in ("magnitude:1x4:0.5", "magnitude:unstructured:0.75"):
        pruned = weights_of(Prune(spec)(network))["first.weight"]
        scale = np.maximum(np.abs(pruned).max(0), 1e-9) / 127  # a channel may have no weight left
        rounded = np.rint(pruned / scale) * scale
        found = by_label[spec]
        assert found.pruning == pytest.approx(ratio(X, weight, pruned), rel=1e-5)
        assert found.weights == pytest.approx(ratio(X, weight, rounded), rel=1e-4)
        assert found.sparsity == np.mean(pruned == 0)
        assert found.error == found.weights + found.activations
    assert by_label["int8"].pruning == 0 < by_label["int8"].weights < 1e-3
    assert by_label["float32"].error == 0
    for level in (0.5, 0.75):  # what is left makes up for what goes
        for pattern in ("1x4", "unstructured"):
            (surgeon,) = (o for o in first.options if o.label.startswith(f"sparsegpt:{pattern}:{level}"))
            assert surgeon.pruning < by_label[f"magnitude:{pattern}:{level}"].pruning


def test_the_error_by_rounding_inputs_is_that_of_uniform_noise(network, tables):
    """Of the real rounding it is within a third: 64 samples of 16 values are few."""
    low, high = min(0.0, X.min()), max(0.0, X.max())
    step = (high - low) / 255
    weight, (first, _) = weights_of(network)["first.weight"], tables
    option = first.options[first.index("int8")]
    signal = np.square(X @ weight).sum()
    noise = np.square((np.rint(X / step) * step - X) @ weight).sum()
    assert option.activations == pytest.approx(noise / signal, rel=1 / 3)


def test_the_greedy_technique_is_tried_where_it_is_named(network, calibrated):
    space = Space(techniques=("sparsegpt", "obc"), patterns=("unstructured",), levels=(0.5,))
    found, _ = find_subjects(network, Quantize()(calibrated), SAMPLES, space, Target.parse("native"), 1)
    surgeon, greedy, *_ = options_of(found[0], isa(Target.parse("native").isa))
    assert greedy.prune == "obc:unstructured:0.5"
    assert greedy.pruning == pytest.approx(surgeon.pruning, rel=0.1)


def test_rows_are_rounded_as_quantize_rounds_weights(network, subjects):
    for layer, subject in zip(find_layers(network), subjects, strict=True):
        weight = weights_of(network)[layer.weight.name]
        steps, values = quantized_rows(subject.rows)
        stored = quantize_rows(layer, weight, symmetric_scale(layer, weight).astype(np.float64))
        np.testing.assert_array_equal(layer.from_rows(steps), stored)
        np.testing.assert_allclose(values, subject.rows, atol=np.abs(subject.rows).max() / 254)


def test_fewer_blocks_take_fewer_bytes_and_never_more_time(subjects):
    options = {option.label: option for option in options_of(subjects[0], isa(Target.parse("native").isa))}
    half, quarter, dense = (options[name] for name in ("magnitude:1x4:0.5", "magnitude:1x4:0.75", "int8"))
    assert quarter.nanoseconds <= half.nanoseconds <= dense.nanoseconds
    assert quarter.nbytes <= half.nbytes <= dense.nbytes < options["float32"].nbytes
    assert LayerOption(**half.to_json()) == half


def test_a_stitched_network_is_the_one_that_was_chosen(network, calibrated, subjects, tables):
    """Dense int8, float32, and each layer with zeros of its own, against the passes one after the other."""
    stitcher = Stitcher(calibrated, subjects, tables)
    feed = {"x": SAMPLES["x"][:1]}

    def stitched(*labels):
        choice = tuple(table.index(label) for table, label in zip(tables, labels, strict=True))
        return next(iter(stitcher.evaluator(choice).run(feed).values()))

    np.testing.assert_array_equal(stitched("int8", "int8"), run_compiled(Quantize()(calibrated), feed)[0])
    np.testing.assert_array_equal(stitched("float32", "float32"), run_compiled(network, feed)[0])
    both = Prune("magnitude:unstructured:0.75:only=second")(Prune("magnitude:1x4:0.5:only=first")(network))
    expected = Quantize()(with_weights(calibrated, weights_of(both)))
    found = stitched("magnitude:1x4:0.5", "magnitude:unstructured:0.75")
    np.testing.assert_array_equal(found, run_compiled(expected, feed)[0])


def test_a_choice_as_a_recipe(tables):
    def recipe(*labels):
        choice = tuple(table.index(label) for table, label in zip(tables, labels, strict=True))
        return recipe_of(tables, choice, Recipe(keep_float=("other",)))

    same = recipe("magnitude:1x4:0.5", "magnitude:1x4:0.5")
    assert [str(spec) for spec in same.prune] == ["magnitude:1x4:0.5:only=first,second"]
    assert same.keep_float == ("other",)
    mixed = recipe("float32", "magnitude:unstructured:0.75")
    assert [str(spec) for spec in mixed.prune] == ["magnitude:unstructured:0.75:only=second"]
    assert mixed.keep_float == ("other", "first")
    assert recipe("int8", "int8").prune == ()


def test_closeness_by_hand():
    reference = Reference(lambda feed: {"y": feed["x"]}, [{"x": np.array([3.0, 4.0])}, {"x": np.array([0.0, 5.0])}])
    found = reference.closeness(lambda feed: {"y": feed["x"] * np.array([1.0, 0.0])})
    assert found.noise == pytest.approx((16 + 25) / 50)
    assert found.cosine == pytest.approx((3 / 5 + 0) / 2)
    broken = reference.closeness(lambda feed: {"y": feed["x"] * np.nan})
    assert (broken.noise, broken.cosine) == (1e9, -1.0)


@pytest.mark.parametrize("name", ["conv1", "/encoder/layer.0/MatMul", "a*b", "a?[b]", "x:y,z"])
def test_a_glob_of_a_name_matches_it(name):
    glob = glob_of(name)
    assert fnmatchcase(name, glob)
    assert ":" not in glob and "," not in glob
    assert not fnmatchcase(name + "1", glob)
