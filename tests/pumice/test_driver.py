import json
import math

import numpy as np
import onnx
import pytest
from tiny import tiny_onnx

import pumice
from pumice.errors import ModelError, UsageError
from pumice.evaluation import Metric
from pumice.peers import OnnxRuntime, is_quantized, quantize_int8, read_pinned

SHAPE = (1, 1, 8, 8)


def test_int8_needs_calibration_data():
    with pytest.raises(UsageError, match="--no-quantize"):
        pumice.compile(tiny_onnx(batch=1))


def test_a_model_that_is_quantized_already_needs_none_and_keeps_its_scales(model_path, samples):
    quantized = quantize_int8(read_pinned(model_path, {"image": SHAPE}), {"image": samples})
    assert is_quantized(quantized)
    compiled = pumice.compile(onnx.load_from_string(quantized))
    assert [layer.dtype for layer in compiled.layers] == ["int8"] * 3
    peer = OnnxRuntime(quantized, 1)
    for sample in samples[:4]:
        expected = peer.run({"image": sample[None]})["logits"]
        np.testing.assert_allclose(compiled(sample[None])["logits"], expected, atol=0.05 * np.abs(expected).max())


def test_peers_read_models_with_external_data(tmp_path, samples):
    onnx.save(tiny_onnx(), tmp_path / "model.onnx", save_as_external_data=True, location="data", size_threshold=0)
    inside = read_pinned(tmp_path / "model.onnx", {"image": SHAPE})
    expected = OnnxRuntime(tiny_onnx().SerializeToString(), 1).run({"image": samples[:1]})["logits"]
    np.testing.assert_array_equal(OnnxRuntime(inside, 1).run({"image": samples[:1]})["logits"], expected)


def test_peers_refuse_what_is_not_the_librarys_model(model_path):
    with pytest.raises(ModelError, match="'image'"):
        read_pinned(model_path, {"picture": SHAPE})
    with pytest.raises(ModelError, match="ONNX Runtime"):
        OnnxRuntime(b"not a model", 1)
    with pytest.raises(ModelError, match="is for 'picture', and the inputs of the model are 'image'"):
        quantize_int8(read_pinned(model_path, {"image": SHAPE}), {"picture": np.zeros(SHAPE, np.float32)})


def test_arguments_of_the_wrong_kind(model_path, samples):
    with pytest.raises(UsageError, match="of type ndarray"):
        pumice.compile(model_path, inputs={"image": SHAPE}, calibration=samples)
    with pytest.raises(UsageError, match=r"'haed' names no layer of .*; its layers are stem, conv, fc"):
        pumice.compile(model_path, inputs={"image": SHAPE}, calibration={"image": samples}, keep_float="haed")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"reconstruct": 5}, "nothing is pruned here"),
        ({"reconstruct": 5, "prune": "filters:0.25"}, "nothing is pruned here"),
        ({"reconstruct_whole": True, "prune": "magnitude:1x4:0.5"}, "has no number of steps"),
    ],
)
def test_reconstruction_that_would_do_nothing_is_refused(model_path, samples, given, says):
    with pytest.raises(UsageError, match=says):
        pumice.compile(model_path, inputs={"image": SHAPE}, calibration={"image": samples}, **given)


def test_a_metric_is_kept_before_and_after(tmp_path, model_path, samples):
    """Before is the model's own value, after that of the library; the report on it says both."""

    def metric(run):
        logits = np.concatenate([run({"image": sample[None]})["logits"] for sample in samples])
        return {"largest": logits.max(), "mean": logits.mean()}

    compiled = pumice.compile(
        model_path, inputs={"image": SHAPE}, calibration={"image": samples}, prune="magnitude:1x4:0.5",
        metric=Metric(tmp_path / "metric.py", "metric", metric),
    )  # fmt: skip
    found = compiled.manifest["accuracy"]
    peer = OnnxRuntime(read_pinned(model_path, {"image": SHAPE}), 1)
    before, after = metric(peer.run), metric(lambda feed: compiled(**feed))
    for name in ("largest", "mean"):
        assert found[name]["before"] == pytest.approx(before[name], rel=1e-5, abs=1e-5)
        assert found[name]["after"] == pytest.approx(after[name], rel=1e-6)
        assert found[name]["before"] != found[name]["after"]
    assert f"mean {before['mean']:.4g} -> {after['mean']:.4g} (higher is better)" in compiled.report(120)


def test_a_live_module(samples):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 4))
    example = torch.from_numpy(samples[:1])
    compiled = pumice.compile(module.eval(), inputs=(example,), quantize=False)
    (output,) = compiled(samples[:1]).values()
    np.testing.assert_allclose(output, module(example).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_masks_given_as_arrays(model_path, samples):
    options = {"inputs": {"image": SHAPE}, "quantize": False}
    first = pumice.compile(model_path, **options).layers[0]
    compiled = pumice.compile(model_path, **options, masks={first.weight: np.zeros(first.shape, bool)})
    assert compiled.layers[0].sparsity == 1.0
    assert compiled.layers[0].pruned_by == "masks given in Python"


def test_every_instruction_set_of_this_machine_gives_the_same_numbers(model_path, samples):
    from pumice.targets.detect import host_features
    from pumice.targets.target import Target

    results = {}
    for name in ("x86-64", "x86-64-v3", "x86-64-v4", "x86-64-v4-vnni"):
        if Target.parse(name).features <= host_features():
            compiled = pumice.compile(model_path, target=name, inputs={"image": SHAPE}, calibration={"image": samples})
            results[name] = compiled(samples[:1])["logits"]
    if not results:
        pytest.skip("no x86 CPU")
    first = next(iter(results.values()))
    for name, result in results.items():
        np.testing.assert_array_equal(result, first, err_msg=name)


def test_stages_are_told_with_their_failure(model_path, samples):
    told = []
    with pytest.raises(ModelError):
        pumice.compile(
            model_path,
            inputs={"image": SHAPE},
            calibration={"image": samples * np.nan},
            progress=lambda stage, seconds: told.append((stage, seconds)),
        )
    assert told[0] == ("read the model", None)
    assert told[1][1] > 0
    assert math.isnan(told[-1][1])


def test_the_manifest_is_strict_json_and_says_how_it_was_made(compiled):
    text = json.dumps(compiled.manifest, allow_nan=False)
    manifest = json.loads(text)
    assert manifest["options"]["recipe"]["calibration_method"] == "minmax"
    assert manifest["versions"]["tvm"].startswith("0.27")
    assert set(manifest["target"]) == {"name", "tvm", "architecture", "isa", "features", "gpus"}


def test_the_same_model_gives_the_same_library(compiled, library, model_path, samples, tmp_path):
    again = pumice.compile(model_path, inputs={"image": SHAPE}, calibration={"image": samples})
    again.save(tmp_path / "again.so")
    assert (tmp_path / "again.so").read_bytes() == library.read_bytes()


def test_a_float_budget_keeps_the_most_harmful_layers_float(model_path, samples):
    given = {"inputs": {"image": SHAPE}, "calibration": {"image": samples}, "check": False}
    everything = pumice.compile(model_path, float_budget=1.0, **given)
    kept = [layer for layer in everything.layers if layer.dtype == "float32"]
    assert kept and all("kept float by the budget" in layer.reason for layer in kept)
    largest = max(layer.macs for layer in everything.layers)
    some = pumice.compile(model_path, float_budget=0.5 * largest / sum(layer.macs for layer in kept), **given)
    assert max(some.layers, key=lambda layer: layer.macs).dtype == "int8"
