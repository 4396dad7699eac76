import json

import pytest

pytest.importorskip("matplotlib")

from bench.plots import draw_all

KERNEL = {"family": "pumice", "median_ms": 1.0, "gops": 10.0, "nbytes": 1000, "speedup": 2.0}
FILES = {
    "layers": {
        "layer": "a layer",
        "threads": 1,
        "best_dense": "Peer",
        "break_even": {"1x4": 0.4, "4x4": None},
        "kernels": [
            {**KERNEL, "pattern": "dense", "zeros": 0.0},
            *({**KERNEL, "pattern": form, "zeros": zeros} for form in ("1x4", "4x4") for zeros in (0.0, 0.9)),
        ],
    },
    "networks": {
        "network": "net",
        "threads": 2,
        "engines": [{"name": "Pumice", "family": "pumice", "median_ms": 1.0, "p10_ms": 0.9, "p90_ms": 1.3}],
    },
    "machine": {"threads": 1, "gops": {"int8": 900.0}, "gbytes": {"L1": 400.0, "memory": 30.0}},
}


def write(folder, *names):
    for name in names:
        (folder / f"{name}.json").write_text(json.dumps({"benchmark": name, "runs": [FILES[name]]}))


def test_a_picture_for_each_file_and_thread_count(tmp_path):
    write(tmp_path, "layers", "networks", "machine")
    written = draw_all(tmp_path, tmp_path / "plots")
    assert sorted(path.name for path in written) == ["networks-2.svg", "roofline-1.svg", "sparsity-1.svg"]
    assert all(path.read_text().startswith("<?xml") for path in written)


def test_without_the_machine_there_is_no_roofline(tmp_path):
    write(tmp_path, "layers")
    assert [path.name for path in draw_all(tmp_path, tmp_path, "png")] == ["sparsity-1.png"]


def test_nothing_to_draw(tmp_path):
    assert draw_all(tmp_path, tmp_path) == []
