"""The advisor on a small network, from the model to a recipe that compiles."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper
from tiny import tiny_onnx

from pumice.advise import Effort, advise_model
from pumice.advisor.budget import Budget
from pumice.advisor.subjects import Space
from pumice.cli import main
from pumice.driver import compile_model
from pumice.errors import AccuracyBudgetError, PerformanceBudgetError, UsageError
from pumice.evaluation import Metric
from pumice.recipe import Recipe, read_recipe

IMAGES = {"image": np.random.default_rng(0).standard_normal((16, 1, 8, 8)).astype(np.float32)}
SPACE = Space(techniques=("magnitude", "sparsegpt"), patterns=("1x4",), levels=(0.5, 0.9), removals=())
REMOVING = replace(SPACE, removals=("filters:0.125", "filters:0.5"))
QUICK = Effort(trials=3, points=2, seconds=0.01)


def advise(budget, model=None, space=SPACE, **given):
    model = model or tiny_onnx(batch=1)
    return advise_model(model, calibration=IMAGES, budget=budget, space=space, effort=QUICK, threads=1, **given)


def with_idle_filters():
    """The second half of the filters of both convolutions adds next to nothing."""
    model = tiny_onnx(batch=1)
    for tensor in model.graph.initializer:
        if tensor.name in ("stem.weight", "conv.weight", "conv.bias"):
            array = numpy_helper.to_array(tensor).copy()
            array[8:] *= 1e-3
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model


def indifferent(folder):
    """A metric to which all networks are equal, so that the smallest is taken."""
    script = folder / "metric.py"
    script.write_text("")
    return Metric(script, "any", lambda run: 1.0)


@pytest.mark.slow
def test_the_recipe_compiles_to_what_the_advice_says(tmp_path):
    advice = advise(Budget.parse("max-drop", "1%"), metric=indifferent(tmp_path))
    chosen = advice.chosen
    assert chosen is not None
    assert chosen.recipe.prune
    artifact = compile_model(tiny_onnx(batch=1), calibration=IMAGES, recipe=chosen.recipe, threads=1)
    pruned = {layer.name for layer in artifact.layers if layer.pruned_by}
    assert pruned == {name for name, option in advice.chosen_options().items() if ":" in option}


def test_what_is_out_of_reach_is_said_with_the_least_that_can_be_had():
    with pytest.raises(PerformanceBudgetError, match="kB") as caught:
        advise(Budget.parse("size", "1kB"))
    assert caught.value.exit_code == 7


def test_a_latency_is_kept_and_uniform_settings_get_as_much():
    """Of a target that is not here times are sums of the cost table: nothing is timed."""
    advice = advise(Budget.parse("latency", "70%"), target="armv8.2-a+dotprod")
    (dense,) = (point for point in advice.points if point.kind == "int8")
    allocated = [point for point in advice.points if point.kind == "allocated"]
    uniform = [point for point in advice.points if point.kind == "uniform"]
    chosen, limit = advice.chosen, 0.7 * dense.expected_ms * (1 + 1e-9)
    assert chosen is not None and allocated and uniform
    assert all(point.expected_ms <= limit for point in [chosen, *uniform])
    assert {str(point.recipe.prune[0]).split(":")[0] for point in uniform} == {"magnitude", "sparsegpt"}
    assert all(chosen.drop <= point.drop for point in allocated if point.expected_ms <= limit)


def test_filters_are_taken_out_first_where_that_loses_less():
    """By zeros alone the filters that matter lose weights too. An eighth of these layers is no whole four filters."""
    advice = advise(
        Budget.parse("latency", "45%"), model=with_idle_filters(), space=REMOVING, target="armv8.2-a+dotprod"
    )
    (dense,) = (point for point in advice.points if point.kind == "int8")
    limit = 0.45 * dense.expected_ms * (1 + 1e-9)
    chosen, kept = advice.chosen, [point for point in advice.points if point.expected_ms <= limit]
    assert chosen in kept
    assert [str(spec).split(":")[0] for spec in chosen.recipe.removals] == ["filters"]
    assert chosen.drop < min(point.drop for point in kept if not point.recipe.removals)
    assert any(point.kind == "uniform" and point.recipe.removals for point in kept)
    artifact = compile_model(with_idle_filters(), calibration=IMAGES, recipe=chosen.recipe, threads=1)
    zeroed = {layer.name for layer in artifact.layers if "1x4" in (layer.pruned_by or "")}
    assert zeroed == {name for name, option in advice.chosen_options().items() if ":" in option}


@pytest.mark.slow
def test_what_loses_too_much_by_itself_is_not_looked_at_further():
    """Where no filter is idle and little is asked for, zeros lose less than filters do."""
    advice = advise(Budget.parse("latency", "90%"), target="armv8.2-a+dotprod", space=REMOVING)
    assert any("filters:0.5 alone loses" in remark for remark in advice.remarks)
    assert not any("filters:0.5, " in point.label for point in advice.points)
    assert not advice.chosen.recipe.removals


@pytest.mark.slow
def test_what_zeros_alone_do_not_reach_is_reached_with_fewer_filters():
    space = replace(REMOVING, levels=(0.5,))
    given = {"model": with_idle_filters(), "target": "armv8.2-a+dotprod"}
    with pytest.raises(PerformanceBudgetError, match="every layer at its cheapest option"):
        advise(Budget.parse("latency", "35%"), space=replace(space, removals=()), **given)
    advice = advise(Budget.parse("latency", "35%"), space=space, **given)
    assert advice.chosen.recipe.removals
    with pytest.raises(PerformanceBudgetError, match=r"with filters:0\.5, then every layer at its cheapest option"):
        advise(Budget.parse("latency", "1%"), space=space, **given)


@pytest.mark.slow
def test_a_base_that_reconstructs_does_so_where_there_are_zeros():
    advice = advise(Budget.parse("size", "99%"), base=Recipe(reconstruct=2), space=REMOVING)
    by_kind = {point.kind: point.recipe.reconstruct for point in advice.points if not point.recipe.removals}
    assert (by_kind["int8"], by_kind["float32"], by_kind["frontier"]) == (0, 0, 2)
    assert {point.recipe.reconstruct for point in advice.points if point.label == "filters:0.5"} <= {0}


def test_an_accuracy_that_even_everything_reverted_misses_is_an_error(tmp_path):
    calls, script = [], tmp_path / "metric.py"
    script.write_text("")

    def luck(run):
        calls.append(run)
        return 1.0 if len(calls) == 1 else 0.0  # the float model alone is any good

    with pytest.raises(AccuracyBudgetError) as caught:
        advise(Budget.parse("max-drop", "0.01"), metric=Metric(script, "luck", luck))
    assert caught.value.exit_code == 6


@pytest.mark.slow
@pytest.mark.parametrize("space", [SPACE, REMOVING], ids=["zeros", "removals"])
def test_what_was_found_is_not_looked_for_again(tmp_path, space):
    found, sizes = [], []
    for _ in range(2):
        given = {"metric": indifferent(tmp_path), "work_file": tmp_path / "work", "space": space}
        found.append(advise(Budget.parse("max-drop", "1%"), **given))
        sizes.append((tmp_path / "work").stat().st_size)
    assert sizes[0] == sizes[1]  # nothing was found anew
    assert found[0].chosen.recipe == found[1].chosen.recipe


def test_another_process_knows_what_one_has_found():
    """The order in which a set of texts prints is another in each process."""
    code = "from pumice.advise import _device_key; from pumice.targets.target import Target; "
    code += "print(_device_key(Target.parse('x86-64-v4-vnni')))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1 and b"avx512_vnni" in found.pop()


@pytest.mark.parametrize("effort", [{"points": 0}, {"trials": -1}, {"processes": 0}])
def test_an_effort_that_finds_nothing_is_refused(effort):
    with pytest.raises(UsageError, match="there must be at least one"):
        Effort(**effort)


def test_a_base_that_prunes_is_refused():
    with pytest.raises(UsageError, match="the recipe to start from prunes"):
        advise(None, base=Recipe().but(prune="magnitude:1x4:0.5"))


def test_the_command_writes_recipe_and_advice(tmp_path, monkeypatch, capsys):
    model, data = tmp_path / "tiny.onnx", tmp_path / "images.npz"
    model.write_bytes(tiny_onnx(batch=1).SerializeToString())
    np.savez(data, **IMAGES)
    script = tmp_path / "metric.py"
    script.write_text("def mean(run):\n    return 1.0\n")
    recipe, found = tmp_path / "recipe.toml", tmp_path / "advice.json"
    options = [
        "--techniques",
        "magnitude",
        "--patterns",
        "1x4",
        "--levels",
        "0.5,0.9",
        "--trials",
        "2",
        "--points",
        "2",
    ]
    options += [
        "--removals",
        "none",
        "--seconds",
        "0.01",
        "--threads",
        "1",
        "--eval",
        f"{script}:mean",
        "--max-drop",
        "1%",
    ]
    files = ["--calibration", str(data), "-o", str(recipe), "--advice", str(found)]
    assert main(["advise", str(model), *files, *options]) == 0
    printed = capsys.readouterr().out
    assert "mean" in printed
    assert read_recipe(recipe).prune
    points = json.loads(found.read_text())["points"]
    assert sum(point["chosen"] for point in points) == 1
    output = ["-o", str(tmp_path / "m.so"), "--calibration", str(data)]
    assert main(["compile", str(model), *output, "--recipe", str(recipe)]) == 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--latency", "soon"], 2, "--latency soon: is no budget"),
        (["--max-drop", "1%", "--techniques", "luck"], 2, "there is no technique 'luck'"),
        (["--max-drop", "1%", "--removals", "magnitude:1x4:0.5"], 2, "takes no filters or heads out"),
        (["-o", "r.toml"], 2, "without a budget no recipe is chosen"),
        (["--eval", "nowhere.py:f", "--max-drop", "1%"], 2, "nowhere.py"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path, monkeypatch, capsys, options, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.onnx").write_bytes(tiny_onnx(batch=1).SerializeToString())
    np.savez(tmp_path / "images.npz", **IMAGES)
    found = main(["advise", "tiny.onnx", "--calibration", "images.npz", *options])
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in printed
    assert found == code
