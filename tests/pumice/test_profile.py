"""The time of every step: which steps there are, and that the numbers of an inference stay what they were."""

import json

import numpy as np
import pytest

import pumice
from pumice import cli, profile
from pumice.errors import UsageError
from pumice.profile import profile_steps
from pumice.record import LayerRecord


@pytest.fixture(scope="module")
def loaded(library):
    return pumice.load(library, threads=1)


def test_every_step_is_listed_in_order(loaded, samples):
    result = loaded.profile({"image": samples[:1]}, seconds=0.05)
    assert [step.name for step in result.steps if step.is_layer] == ["stem", "conv", "fc"]
    assert len(result.steps) == len(loaded.manifest["steps"])
    assert sum(step.share for step in result.steps) == pytest.approx(1)
    assert result.rounds >= 5
    for layer, step in zip(loaded.layers, (s for s in result.steps if s.is_layer), strict=True):
        assert (step.kernel, step.macs) == (layer.kernel, layer.macs)
        assert step.macs_done == round(layer.macs * (1 - layer.sparsity))


def test_profiling_changes_no_numbers(loaded, samples):
    before = loaded(samples[:1])["logits"]
    loaded.profile({"image": samples[:1]}, seconds=0.01)
    np.testing.assert_array_equal(loaded(samples[:1])["logits"], before)


def test_inputs_that_do_not_fit_are_refused(loaded):
    with pytest.raises(UsageError, match="'image' is missing"):
        loaded.profile({})


def test_times_are_medians_less_the_cost_of_a_call(monkeypatch):
    class Clock:
        now = 0

        def perf_counter(self):
            return self.now / 1e9

        def perf_counter_ns(self):
            return self.now

    clock = Clock()

    def run(first=0, last=2):
        clock.now += 1000 + sum([4000, 12_000][first:last])

    def call():
        clock.now += 30_000

    monkeypatch.setattr(profile, "time", clock)
    steps = [{"kernel": "pack", "layer": ""}, {"kernel": "layer_a", "layer": "a"}]
    layers = [LayerRecord("a", "linear", "a.weight", (4, 4), macs=6000, sparsity=0.75, kernel="dense")]
    result = profile_steps(run, call, steps, layers, 0.001)
    pack, layer = result.steps
    assert (pack.name, pack.median_us, pack.gops) == ("pack", 4.0, None)
    assert (layer.name, layer.median_us, layer.share) == ("a", 12.0, 0.75)
    assert (layer.macs, layer.macs_done, layer.gops) == (6000, 1500, pytest.approx(1.0))
    assert (result.inference_us, result.call_us) == (17.0, 30.0)
    assert (result.layers_us, result.between_us) == (12.0, 4.0)
    assert "1 steps between them" in str(result)


def test_the_command_shows_the_layers(library, capsys):
    assert cli.main(["bench", str(library), "--layers", "--seconds", "0.1", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert "stem" in shown and "one inference, all steps in one go" in shown
    assert cli.main(["bench", str(library), "--layers", "--seconds", "0.1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {step["name"] for step in data["layers"]["steps"] if step["is_layer"]} == {"stem", "conv", "fc"}
    assert data["layers"]["inference_us"] > 0
