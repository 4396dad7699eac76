"""The command from the outside: what it prints, what it leaves behind, and every exit code."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from tiny import tiny_onnx

from pumice import cli
from pumice.cli import main


@pytest.fixture
def run(capfd):
    """Run the command in this process: exit code, stdout, stderr."""

    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = stopped.code
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run


@pytest.fixture
def image_path(tmp_path, samples):
    path = tmp_path / "image.npz"
    np.savez(path, image=samples[:1])
    return path


PINNED = ("--input", "image=1x1x8x8")


def test_the_whole_road(run, tmp_path, model_path, calibration_path, image_path, compiled, samples):
    library, outputs = tmp_path / "model.so", tmp_path / "out.npz"
    code, out, err = run("compile", model_path, "-o", library, *PINNED, "--calibration", calibration_path)
    assert code == 0
    assert all(word in out for word in ("tiny.onnx for native", "conv", "int8", "sparse", "1x4", "total: 3 layers"))
    assert "calibrate" in err
    assert " s\n" in err
    code, out, _ = run("run", library, "-i", image_path, "-o", outputs)
    assert code == 0
    assert "logits" in out
    with np.load(outputs) as written:
        np.testing.assert_array_equal(written["logits"], compiled(samples[:1])["logits"])
    code, out, _ = run("inspect", library)
    assert code == 0
    assert "tiny.onnx for native" in out
    code, out, _ = run("bench", library, "--seconds", "0.1", "--threads", "1")
    assert code == 0
    assert "pumice" in out
    assert "1 thread," in out


def test_json_parses_and_says_the_same(run, tmp_path, model_path, calibration_path, image_path):
    library = tmp_path / "model.so"
    options = ("--calibration", calibration_path, "--prune", "magnitude:1x4:0.5:keep=fc", "--keep-float", "fc")
    code, out, _ = run("compile", model_path, "-o", library, *PINNED, *options, "--threads", 1, "--json")
    manifest = json.loads(out)
    assert code == 0
    assert manifest["library"]["bytes"] == library.stat().st_size
    assert [layer["dtype"] for layer in manifest["layers"]] == ["int8", "int8", "float32"]
    assert manifest["options"]["recipe"]["prune"] == ["magnitude:1x4:0.5:keep=fc"]
    inspected = json.loads(run("inspect", library, "--json")[1])
    assert inspected["layers"] == manifest["layers"]
    model = json.loads(run("inspect", model_path, *PINNED, "--json")[1])
    assert [layer["name"] for layer in model["layers"]] == ["stem", "conv", "fc"]
    ran = json.loads(run("run", library, "-i", image_path, "--json")[1])
    assert ran["outputs"][0]["shape"] == [1, 10]
    timed = json.loads(run("bench", library, "--seconds", "0.1", "--json")[1])
    assert timed["threads"] == 1  # what the library was compiled with
    assert timed["engines"][0]["median_ms"] > 0


@pytest.mark.parametrize(("engine", "title"), [("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO")])
def test_bench_beside_another_engine(run, library, model_path, calibration_path, engine, title):
    if importlib.util.find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed")
    arguments = ("--vs", engine, "--model", model_path, "--seconds", "0.2", "--threads", "1", "--json")
    code, out, _ = run("bench", library, *arguments, "--calibration", calibration_path)
    assert code == 0
    assert [timed["name"] for timed in json.loads(out)["engines"]] == ["pumice", f"{title} f32", f"{title} int8"]
    code, out, _ = run("bench", library, *arguments)
    assert "needs --calibration" in json.loads(out)["notes"][0]


def test_masks_from_a_side_file(run, tmp_path, model_path):
    mask = np.ones((16, 1, 3, 3), bool)
    mask[:12] = False
    np.savez(tmp_path / "masks.npz", **{"stem.weight": mask})
    code, out, _ = run("inspect", model_path, *PINNED, "--masks", tmp_path / "masks.npz", "--json")
    assert code == 0
    stem = json.loads(out)["layers"][0]
    assert stem["sparsity"] == pytest.approx(0.75)
    assert "masks.npz" in stem["pruned_by"]


@pytest.mark.parametrize("command", [[], *([name] for name in cli.COMMANDS)])
def test_help_shows_an_example(run, command):
    code, out, _ = run(*command, "-h")
    assert code == 0
    assert ("example:\n  pumice " if command else "exit codes") in out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["compile"],
        ["compile", "MODEL"],
        ["compile", "MODEL", "-o", "OUT"],  # to int8, and no calibration data
        ["compile", "MODEL", "-o", "OUT", "--no-quantize", "--threads", "0"],
        ["compile", "MODEL", "-o", "OUT", "--no-quantize", "--input", "image=1xx8"],
        ["compile", "MODEL", "-o", "OUT", "--no-quantize", "--input", "1x1x8x8"],
        ["compile", "MODEL", "-o", "OUT", "--no-quantize", "--input", "image=1x1x0x8"],
        ["compile", "MODEL", "-o", "OUT", "--no-quantize", "--input", "image=1x1x8x8", "--input", "image=1x1x8x8"],
        ["compile", "MODEL", "-o", "OUT", "--no-quantize", "--input", "picture=1x1x8x8"],
        ["compile", "MODEL", "-o", "OUT", "--no-quantize", "--prune", "magic", "--input", "image=1x1x8x8"],
        ["compile", "MODEL", "-o", "OUT", "--calibration", "CAL", "--calibration-method", "magic", *PINNED],
        ["compile", "MODEL", "-o", "MODEL", "--no-quantize"],
        ["compile", "MODEL", "-o", "OUT", *PINNED, "--calibration", "CAL", "--keep-float", "haed*"],
        ["compile", "MODEL", "-o", "/dev/null", "--no-quantize"],
        ["compile", "MODEL", "-o", "FOLDER", "--no-quantize"],
        ["compile", "MODEL", "-o", "FOLDER/none/model.so", "--no-quantize"],
        ["inspect", "MODEL"],  # its batch is open
        ["run", "LIBRARY"],
        ["run", "LIBRARY", "-i", "MODEL"],
        ["run", "LIBRARY", "-i", "CAL"],  # 16 samples for a batch of one
        ["run", "LIBRARY", "-i", "CAL", "-o", "LIBRARY"],
        ["run", "LIBRARY", "-i", "CAL", "-o", "CAL"],
        ["run", "LIBRARY", "-i", "CAL", "--threads", "0"],
        ["run", "LIBRARY", "-i", "CAL", "--threads", "two"],
        ["verify", "LIBRARY", "--threads", "0"],
        ["bundle", "LIBRARY"],
        ["bundle", "-o", "OUT"],
        ["bundle", "LIBRARY", "LIBRARY", "-o", "OUT"],  # the second would never be chosen
        ["bundle", "LIBRARY", "-o", "LIBRARY"],
        ["bench", "LIBRARY", "--vs", "onnxruntime"],
        ["bench", "LIBRARY", "--seconds", "-1"],
        ["bench", "LIBRARY", "--seconds", "soon"],
        ["bench", "LIBRARY", "--vs", "magic"],
        ["demo", "--data", "FOLDER", "--out", "FOLDER"],
    ],
    ids=" ".join,
)
def test_2_is_usage(run, tmp_path, model_path, calibration_path, library, arguments):
    before = model_path.read_bytes()
    code, out, err = run(*_filled(arguments, tmp_path, model_path, calibration_path, library))
    assert code == 2
    assert err.strip()
    assert not out
    assert model_path.read_bytes() == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["compile", "FOLDER", "-o", "OUT", "--no-quantize"],
        ["compile", "none.onnx", "-o", "OUT", "--no-quantize"],
        ["compile", "CAL.onnx", "-o", "OUT", "--no-quantize"],
        ["compile", "MODEL", "-o", "OUT", *PINNED, "--calibration", "WRONG"],
        ["compile", "MODEL", "-o", "OUT", *PINNED, "--calibration", "MODEL"],
        ["compile", "MODEL", "-o", "OUT", *PINNED, "--no-quantize", "--masks", "CAL"],
        ["inspect", "none.so"],
        ["inspect", "EMPTY.so"],
        ["inspect", "none.pum"],
        ["verify", "EMPTY.so"],
        ["verify", "MODEL"],
        ["bundle", "LIBRARY", "EMPTY.so", "-o", "OUT"],
        ["run", "CAL", "-i", "CAL"],
        ["bench", "MODEL"],
    ],
    ids=" ".join,
)
def test_3_is_a_bad_model(run, tmp_path, model_path, calibration_path, library, arguments):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "EMPTY.so").touch()
    (bad / "CAL.onnx").write_bytes(calibration_path.read_bytes())
    np.savez(bad / "WRONG.npz", image=np.full((4, 1, 8, 8), np.nan, np.float32))
    code, out, err = run(*_filled(arguments, tmp_path, model_path, calibration_path, library))
    assert code == 3
    assert not out
    assert err.splitlines()[-1].startswith("pumice: ")
    assert list(tmp_path.iterdir()) == [bad]


@pytest.mark.parametrize("target", ["sm_20", "pentium", '{"kind": "cuda"}'])
def test_4_is_a_target_without_kernels(run, tmp_path, model_path, target):
    code, _, err = run("compile", model_path, "-o", tmp_path / "model.so", *PINNED, "--no-quantize", "--target", target)
    assert code == 4
    assert target in err


def test_4_is_an_operator_that_is_not_known(run, tmp_path):
    model = tiny_onnx(batch=1)
    model.graph.node[1].op_type = "Levitate"
    model.graph.node[1].domain = "org.example"
    model.opset_import.append(onnx.helper.make_opsetid("org.example", 1))
    onnx.save(model, tmp_path / "model.onnx")
    code, _, err = run("compile", tmp_path / "model.onnx", "-o", tmp_path / "model.so", "--no-quantize")
    assert code == 4
    assert "Levitate" in err
    assert "model.onnx" in err


def test_4_is_a_library_for_another_cpu(run, altered, image_path):
    code, _, err = run("run", altered('"popcnt"', '"flying"'), "-i", image_path)
    assert code == 4
    assert "flying" in err


def test_a_library_for_another_machine_is_inspected_and_not_run(
    run, tmp_path, model_path, calibration_path, image_path
):
    library = tmp_path / "model.so"
    options = (*PINNED, "--calibration", calibration_path, "--target", "armv8.2-a+dotprod", "--no-check")
    assert run("compile", model_path, "-o", library, *options)[0] == 0
    code, out, _ = run("inspect", library)
    assert code == 0
    for shown in ("aarch64", "asimddp", "scale", "zero point", "SHA-256", "of weights", "layer", "conv"):
        assert shown in out
    for command in (("run", library, "-i", image_path), ("verify", library), ("bench", library)):
        code, _, err = run(*command)
        assert code == 4
        assert "compiled for aarch64" in err


def test_5_is_a_missing_tool(run, monkeypatch, tmp_path, model_path, library):
    monkeypatch.setattr("pumice.targets.toolchain.shutil.which", lambda name: None)
    monkeypatch.setattr("pumice.targets.toolchain.importlib.util.find_spec", lambda name: None)
    code, _, err = run("compile", model_path, "-o", tmp_path / "model.so", *PINNED, "--no-quantize")
    assert code == 5
    assert "apt-get install gcc" in err
    for engine in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, engine, None)
        code, _, err = run("bench", library, "--vs", engine, "--model", model_path)
        assert code == 5
        assert f"pip install {engine}" in err


def test_a_failure_leaves_the_old_library(run, monkeypatch, tmp_path, model_path):
    path = tmp_path / "model.so"
    path.write_text("old")
    monkeypatch.setenv("CC", "false")
    assert run("compile", model_path, "-o", path, *PINNED, "--no-quantize")[0] == 5
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [(KeyboardInterrupt(), 130, "interrupted"), (ZeroDivisionError("by\nzero"), 1, "ZeroDivisionError: by")],
)
def test_other_endings(run, monkeypatch, library, error, code, says):
    def fail(args):
        raise error

    monkeypatch.setattr("pumice.commands.inspect.run", fail)
    monkeypatch.delenv("PUMICE_DEBUG", raising=False)
    ended, _, err = run("inspect", library)
    assert ended == code
    assert says in err
    assert len(err.splitlines()) == 1


def test_debugging_shows_where(library, tmp_path):
    command = [sys.executable, "-m", "pumice.cli", "inspect", str(tmp_path / "none.so")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PUMICE_DEBUG": "1"}, check=False)
    assert done.returncode == 3
    assert "Traceback" in done.stderr


def test_a_reader_that_leaves_is_no_error(library):
    command = [sys.executable, "-m", "pumice.cli", "inspect", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait() == 141
    assert not err


def test_names_do_not_drive_the_terminal(run, tmp_path):
    name = "im\x1b[31mage " + "ä" * 3000
    model = tiny_onnx(image=name, logits="out%s\n")
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    code, out, err = run("compile", path, "-o", tmp_path / "model.so", "--no-quantize")
    assert code == 2
    assert "\x1b" not in out + err
    assert len(err) < 5000
    code, out, err = run("compile", path, "-o", tmp_path / "model.so", "--no-quantize", "--input", f"{name}=1x1x8x8")
    assert code == 0
    assert "\x1b" not in out + err
    assert "out%s\\n" in out


def _filled(arguments, tmp_path, model, calibration, library):
    """The placeholders of a command line, replaced by files."""
    whole = {"MODEL": model, "CAL": calibration, "LIBRARY": library, "OUT": tmp_path / "model.so"}
    whole |= {name: tmp_path / "bad" / name for name in ("EMPTY.so", "CAL.onnx")}
    whole["WRONG"] = tmp_path / "bad" / "WRONG.npz"
    return [str(whole.get(a, a)).replace("FOLDER", str(tmp_path)) for a in arguments]
