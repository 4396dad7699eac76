"""The demo's code path, on small untrained networks in place of the embedded ones."""

import json
import sys
import zipfile

import numpy as np
import pytest
from tiny import tiny_onnx

from pumice.cli import main
from pumice.demo.run import to_input


@pytest.fixture
def data(tmp_path):
    draw = np.random.default_rng(3)
    with zipfile.ZipFile(tmp_path / "fashion.zip", "w") as archive:
        for name, zero in (("dense", 0.0), ("blocks80", 0.8), ("blocks90", 0.9)):
            archive.writestr(f"{name}.onnx", tiny_onnx(size=28, zero=zero).SerializeToString())
    np.savez(
        tmp_path / "fashion.npz",
        test_images=draw.integers(0, 256, (6, 28, 28), dtype=np.uint8),
        test_labels=draw.integers(0, 10, 6, dtype=np.uint8),
        calibration_images=draw.integers(0, 256, (4, 28, 28), dtype=np.uint8),
    )
    return tmp_path


def test_the_table_the_json_and_the_plot(data, capsys):
    out = data / "out" / "demo"
    assert main(["demo", "--data", str(data), "--out", str(out), "--seconds", "0.1", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    written = json.loads((out / "demo.json").read_text())
    names = [entry["name"] for entry in written["engines"]]
    assert len(names) == 7
    assert all(name in printed for name in names)
    assert all(entry["milliseconds"] > 0 for entry in written["engines"])
    assert written["engines"][4]["agreement"] == 100  # ONNX Runtime float32 gives the same answers
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert str(out / "demo.png") in printed


def test_without_the_extras_it_says_so_and_goes_on(data, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["demo", "--data", str(data), "--out", str(data), "--seconds", "0.1", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "ONNX Runtime is needed" in printed
    assert "matplotlib is needed" in printed
    assert "Pumice int8, 90 % zero" in printed
    assert not (data / "demo.png").exists()


def test_bytes_become_what_the_networks_were_trained_on():
    image = to_input(np.full((2, 28, 28), 255, np.uint8))
    assert image.shape == (2, 1, 28, 28)
    assert image.dtype == np.float32
    assert image.max() == 1.0
