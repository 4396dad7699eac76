import hashlib
import importlib.util
import json
import sys

import numpy as np
import onnx
import pytest
from tiny import tiny_onnx

from pumice.errors import ModelError, UnsupportedError, UsageError
from pumice.evaluation import load_metric
from pumice.report import Request, make_report
from pumice.report.data import _accuracy_in, read_advice

needs_onnxruntime = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="ONNX Runtime is not installed"
)


def silent(stage, seconds):
    pass


@pytest.fixture
def metric(tmp_path, calibration_path):
    (tmp_path / "metric.py").write_text(
        "import numpy as np\n"
        f"images = np.load({str(calibration_path)!r})['image']\n"
        "def mean(run):\n"
        "    return np.mean([run({'image': image[None]})['logits'] for image in images])\n"
    )
    return load_metric(f"{tmp_path / 'metric.py'}:mean")


def test_nothing_is_run_without_need(library, monkeypatch):
    monkeypatch.setattr("pumice.report.data.load", lambda *_: pytest.fail("the library was loaded"))
    report = make_report(library, Request(), silent)
    content = library.read_bytes()
    assert (report.library.bytes, report.library.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert (report.profile, list(report.timings), list(report.accuracy)) == (None, [], [])
    assert "--no-time" in report.remarks["time"]


def test_times_are_of_every_step(timed, library):
    assert [step["layer"] for step in timed.manifest["steps"] if step["layer"]] == list(timed.layer_microseconds())
    assert [timing.name for timing in timed.timings] == ["Pumice"]
    assert "1 thread of" in timed.place
    json.dumps(timed.to_json(), allow_nan=False)


@needs_onnxruntime
def test_the_original_is_measured_beside_it(library, model_path, metric, compiled, samples):
    request = Request(model_path, metric, feed=lambda model: {"image": samples[:1]}, threads=1, seconds=0.02)
    report = make_report(library, request, silent)
    assert [timing.name for timing in report.timings] == ["Pumice", "ONNX Runtime float32"]
    [accuracy] = report.accuracy
    assert (accuracy.name, accuracy.measured) == ("mean", "by metric.py:mean for this report")
    assert accuracy.after == pytest.approx(np.mean([compiled(image[None])["logits"] for image in samples]))
    assert accuracy.before == pytest.approx(_reference(model_path, samples), rel=1e-5)
    assert report.original.bytes == model_path.stat().st_size
    assert not report.remarks


def _reference(path, samples):
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load(path))
    return np.mean([evaluator.run(None, {"image": image[None]}) for image in samples])


def test_another_original_is_told_apart(library, tmp_path):
    onnx.save(tiny_onnx(seed=7), tmp_path / "other.onnx")
    report = make_report(library, Request(tmp_path / "other.onnx"), silent)
    assert "other.onnx is not the file that was compiled" in report.remarks["original"]


def test_without_the_other_engine_the_rest_is_measured(library, model_path, samples, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    request = Request(model_path, feed=lambda model: {"image": samples[:1]}, seconds=0.02)
    report = make_report(library, request, silent)
    assert "pip install onnxruntime" in report.remarks["peer"]
    assert len(report.timings) == 1


def test_a_library_for_another_machine_is_described_and_not_timed(altered, metric, samples):
    foreign = altered('"popcnt"', '"flying"')
    report = make_report(foreign, Request(feed=lambda model: {"image": samples[:1]}), silent)
    assert "flying" in report.remarks["time"]
    assert report.profile is None
    with pytest.raises(UnsupportedError, match="flying"):  # the metric was asked for, and cannot be had
        make_report(foreign, Request(metric=metric), silent)


def test_wrong_inputs_and_no_library_are_said(library, samples, tmp_path):
    with pytest.raises(UsageError, match=r"'picture' is not known|'image' is missing"):
        make_report(library, Request(feed=lambda model: {"picture": samples[:1]}), silent)
    (tmp_path / "empty.so").touch()
    with pytest.raises(ModelError, match="is empty"):
        make_report(tmp_path / "empty.so", Request(), silent)


def test_accuracy_of_compilation_is_kept_beside_what_is_measured_now(timed):
    manifest = {**timed.manifest, "accuracy": {"top 1": {"before": 0.9, "after": 0.89}, "top 5": {"after": 1}}}
    found = _accuracy_in(manifest, "model.so")
    assert [(a.name, a.before, a.after) for a in found] == [("top 1", 0.9, 0.89), ("top 5", None, 1.0)]
    assert {a.measured for a in found} == {"when it was compiled"}


@pytest.mark.parametrize("accuracy", [{"top 1": 3}, {"top 1": {}}, {"top 1": {"after": "x"}}, [1]])
def test_damaged_accuracy_is_said(accuracy):
    with pytest.raises(ModelError, match=r"model\.so: what its manifest says of accuracy is damaged"):
        _accuracy_in({"accuracy": accuracy}, "model.so")


def test_advice_is_read_and_sorted(tmp_path):
    points = [
        {
            "label": "b",
            "latency_ms": 2,
            "bytes": 100,
            "error": 0.1,
            "chosen": True,
            "later": "is allowed",
        },
        {"label": "unknown", "latency_ms": None},
        {"label": "a", "latency_ms": 1.5, "metric": 0.9},
    ]
    (tmp_path / "advice.json").write_text(json.dumps({"points": points, "target": "native"}))
    first, second, third = read_advice(tmp_path / "advice.json")
    assert (first.label, first.latency_ms, first.bytes, first.error, first.metric, first.chosen) == (
        "a",
        1.5,
        None,
        None,
        0.9,
        False,
    )
    assert (second.label, second.chosen, second.bytes) == ("b", True, 100)
    assert (third.label, third.latency_ms) == ("unknown", None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"points": 3}',
        '{"points": [3]}',
        '{"points": [{"latency_ms": 1}]}',
        '{"points": [{"label": "a", "latency_ms": "soon"}]}',
        '{"points": [{"label": "a", "latency_ms": NaN}]}',
        '{"points": [{"label": "a", "latency_ms": -1}]}',
        '{"points": [{"label": "a", "latency_ms": 1, "metric": Infinity}]}',
        "[" * 100_000,
    ],
    ids=range(11),
)
def test_what_is_no_advice_is_one_sentence(tmp_path, text):
    (tmp_path / "advice.json").write_text(text)
    with pytest.raises(UsageError, match=r"advice\.json: is not what `pumice advise` writes") as caught:
        read_advice(tmp_path / "advice.json")
    assert "\n" not in str(caught.value)


def test_no_advice_is_said(tmp_path):
    with pytest.raises(UsageError, match=r"none\.json: cannot be read: No such file"):
        read_advice(tmp_path / "none.json")
