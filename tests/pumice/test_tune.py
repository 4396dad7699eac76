"""Tuning from end to end: measured once, interrupted and resumed, and what compiling makes of it."""

import json

import numpy as np
import onnx
import pytest
from tiny import tiny_onnx

import pumice
from pumice import cli, kernel_times, tune
from pumice.errors import PumiceError, UsageError
from pumice.tune import tune_model

SHAPES = {"image": (1, 1, 8, 8)}


@pytest.fixture(autouse=True)
def no_time(monkeypatch):
    """Kernels are compiled and compared, and each runs a few times only."""
    monkeypatch.setattr(kernel_times, "_LEAST_ROUNDS", 1)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_times, "_LEAST_ROUNDS", 1)
        path = tmp_path_factory.mktemp("tuned") / "tuning.jsonl"
        tune_model(tiny_onnx(batch=1, zero=0.8), path, threads=1, seconds=1e-9)
    return path


def compile_with(path, samples, **options):
    return pumice.compile(
        tiny_onnx(batch=1, zero=0.8),
        calibration={"image": samples},
        tuning_db=path,
        measure_errors=False,
        **{"threads": 1, **options},
    )


def doctored(database, tmp_path, nanoseconds):
    """The database with other times: ``nanoseconds`` of an entry."""
    lines = [json.loads(line) for line in database.read_text().splitlines()]
    lines = [line if "machine" in line else {**line, "ns": nanoseconds(line)} for line in lines]
    path = tmp_path / "doctored.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_every_layer_is_measured_in_several_forms(database):
    lines = [json.loads(line) for line in database.read_text().splitlines()]
    assert lines[0]["machine"]["threads"] == 1
    by_layer = {}
    for line in lines[1:]:
        by_layer.setdefault(line["workload"], []).append(line)
    assert len(by_layer) == 3
    for entries in by_layer.values():
        assert any(entry["dense"] for entry in entries) and all(entry["ns"] > 0 for entry in entries)
    conv = next(entries for text, entries in by_layer.items() if "16x9x16" in text)
    assert {entry["shared"] for entry in conv if not entry["dense"]} >= {1, 2}


def test_what_is_known_is_not_measured_again(database, monkeypatch):
    def measure(*_):
        raise AssertionError("measured")

    before = database.read_bytes()
    monkeypatch.setattr(tune, "measure", measure)
    found = tune_model(tiny_onnx(batch=1, zero=0.8), database, threads=1)
    assert [tuned.layers for tuned in found] == [("stem",), ("conv",), ("fc",)]
    assert not any(tuned.is_new for tuned in found)
    assert database.read_bytes() == before


def test_interrupted_and_resumed(tmp_path, monkeypatch):
    path, measured = tmp_path / "tuning.jsonl", []

    def measure(work, candidates, *_):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(work.name)
        return dict.fromkeys(candidates, 1.0)

    monkeypatch.setattr(tune, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        tune_model(tiny_onnx(batch=1), path, threads=1)
    assert measured == ["stem", "conv"]
    path.write_text(path.read_text() + '{"workload": "int8, 10x')  # as if it had been killed while it wrote
    measured[:] = ["before"]
    found = tune_model(tiny_onnx(batch=1), path, threads=1)
    assert measured == ["before", "fc"]
    assert [tuned.is_new for tuned in found] == [False, False, True]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_layers_that_are_alike_are_measured_once(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    nodes = [
        onnx.helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"x{i + 1}"], kernel_shape=[1, 1], name=f"conv{i}")
        for i in range(3)
    ]
    shape = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "three",
        [shape("x0", onnx.TensorProto.FLOAT, [1, 16, 6, 6])],
        [shape("x3", onnx.TensorProto.FLOAT, [1, 16, 6, 6])],
        [onnx.numpy_helper.from_array(rng.normal(size=(16, 16, 1, 1)).astype(np.float32), f"w{i}") for i in range(3)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10)
    monkeypatch.setattr(tune, "measure", lambda work, candidates, *_: dict.fromkeys(candidates, 1.0))
    found = tune_model(model, tmp_path / "tuning.jsonl", threads=1)
    assert sorted(len(tuned.layers) for tuned in found) == [1, 2]  # the last one's output is float


def test_compiling_takes_what_was_fastest(database, tmp_path, samples):
    plain = pumice.compile(tiny_onnx(batch=1, zero=0.8), calibration={"image": samples}, threads=1)(samples[:1])
    sparse = compile_with(doctored(database, tmp_path, lambda line: 1e6 + 1e6 * line["dense"]), samples)
    assert all("sparse" in layer.kernel for layer in sparse.layers)
    assert "measured here: sparse" in sparse.layers[1].reason and "dense 2 ms" in sparse.layers[1].reason
    dense = compile_with(doctored(database, tmp_path, lambda line: 2e6 - 1e6 * line["dense"]), samples)
    assert all("dense" in layer.kernel for layer in dense.layers)
    assert "measured here: dense 1 ms, sparse" in dense.layers[1].reason
    for compiled in (sparse, dense):
        np.testing.assert_array_equal(compiled(samples[:1])["logits"], plain["logits"])
    assert dense.manifest["options"]["tuning_db"] == "doctored.jsonl"


def test_without_a_dense_time_the_cost_table_decides(database, tmp_path, samples):
    lines = [line for line in database.read_text().splitlines(keepends=True) if '"dense": true' not in line]
    path = tmp_path / "sparse.jsonl"
    path.write_text("".join(lines))
    assert not any("measured" in layer.reason for layer in compile_with(path, samples).layers)


def test_times_of_another_cpu_are_named(database, tmp_path, samples):
    first, rest = database.read_text().split("\n", 1)
    machine = json.loads(first)["machine"]
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"machine": {**machine, "cpu": "Old Chip"}}) + "\n" + rest)
    assert "measured on Old Chip: " in compile_with(path, samples).layers[1].reason
    path.write_text(json.dumps({"machine": {**machine, "isa": "other"}}) + "\n" + rest)
    with pytest.raises(UsageError, match=r"has times of .* \(other, 1 threads"):
        compile_with(path, samples)


def test_float_layers_are_measured_too(tmp_path, samples):
    path = tmp_path / "float.jsonl"
    found = tune_model(tiny_onnx(batch=1, zero=0.8), path, quantize=False, threads=1, seconds=1e-9)
    assert {tuned.depth for tuned in found} == {1}
    compiled = pumice.compile(tiny_onnx(batch=1, zero=0.8), quantize=False, threads=1, tuning_db=path)
    assert all("measured here" in layer.reason and "float32" in layer.kernel for layer in compiled.layers)


def test_kernels_that_disagree_are_named(tmp_path, monkeypatch):
    weight_in = kernel_times.weight_in

    def wrong(rows, candidate, isa, places):
        return weight_in(rows if candidate[0].is_dense else rows // 2, candidate, isa, places)

    monkeypatch.setattr(kernel_times, "weight_in", wrong)
    with pytest.raises(
        PumiceError, match=r"layer stem: its kernel sparse 4x4 .* gives other numbers than dense .*mistake"
    ):
        tune_model(tiny_onnx(batch=1, zero=0.8), tmp_path / "t.jsonl", threads=1, seconds=1e-9)


def test_the_command(tmp_path, model_path, calibration_path, capsys, monkeypatch):
    path, pinned = tmp_path / "tuning.jsonl", ["--input", "image=1x1x8x8", "--threads", "1"]
    command = ["tune", str(model_path), "-o", str(path), *pinned]
    assert cli.main([*command, "--seconds-per-kernel", "1e-9"]) == 0
    out = capsys.readouterr().out
    assert "1/3 stem: " in out and "3/3 fc: 2 kernels, " in out and "about 0 s left" in out
    assert "3 of 3 layers measured now" in out
    assert cli.main(command) == 0
    assert "0 of 3 layers measured now" in capsys.readouterr().out
    options = ["--calibration", str(calibration_path), "--no-layer-errors", "--tuning-db", str(path)]
    assert cli.main(["compile", str(model_path), "-o", str(tmp_path / "model.so"), *pinned, *options]) == 0
    out = capsys.readouterr().out
    assert "measured here: " in out and "SNR dB" not in out

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "measure", interrupted)
    assert cli.main(["tune", str(model_path), "-o", str(tmp_path / "other.jsonl"), *pinned]) == 130
    assert "other.jsonl keeps the layers that are done" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--device", "pi4"], 4, "--device pi4"),
        (["-o", "MODEL"], 2, "which would be lost"),
        (["-o", "."], 2, "cannot be written"),
        (["--calibration", "none.npz"], 3, "none.npz"),
    ],
)
def test_what_the_command_refuses(tmp_path, model_path, capsys, monkeypatch, options, code, message):
    monkeypatch.chdir(tmp_path)
    arguments = [str(model_path) if option == "MODEL" else option for option in options]
    assert cli.main(["tune", str(model_path), "--input", "image=1x1x8x8", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
