import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from bench import networks_speed
from bench.engines import Engine
from bench.networks_speed import Contender, details, entries, scaling, signal_to_noise, summary
from pumice.bench import Timing


def contender(name, family, dtype, zeros, ms):
    engine = Engine(name, dict, timing=Timing(name, ms, ms, ms, 10, ms / 10), megabytes=1.0)
    return Contender(engine, family, dtype, zeros, snr_db=20.0)


def one_run(threads, fastest):
    contenders = [
        contender("A float32", "a", "float32", 0.0, 10.0),
        contender("A int8", "a", "int8", 0.0, 4.0),
        contender("B int8", "b", "int8", 0.0, 5.0),
        contender("B int8, 90% zero", "b", "int8", 0.9, 3.0),
        contender("Pumice int8", "pumice", "int8", 0.0, 4.0),
        contender("Pumice int8, 90% zero", "pumice", "int8", 0.9, fastest),
    ]
    return {"network": "net", "threads": threads, "engines": entries(contenders)}


def test_the_rival_is_the_best_dense_int8_peer():
    engines = {e["name"]: e for e in one_run(1, 1.0)["engines"]}
    assert [name for name, e in engines.items() if e["is_best_peer"]] == ["A int8"]
    assert engines["Pumice int8, 90% zero"]["speedup"] == pytest.approx(4)
    assert engines["Pumice int8"]["speedup"] == pytest.approx(1)
    assert engines["A float32"]["speedup"] == pytest.approx(0.4)
    json.dumps(list(engines.values()))


def test_tables():
    runs = [one_run(1, 1.0), one_run(2, 0.5)]
    assert "| Pumice int8, 90% zero | 1.000" in details(runs[0])
    cells = [cell.strip() for cell in summary(runs).splitlines()[2].strip("|").split("|")]
    assert cells == ["net", "1", "A int8", "4.000", "1.00", "4.00"]
    cells = [cell.strip() for cell in scaling(runs).splitlines()[-1].strip("|").split("|")]
    assert cells == ["net", "90%", "2.00"]
    assert scaling(runs[:1]) == ""


def test_without_peers_there_is_no_speedup():
    (only,) = entries([contender("Pumice int8", "pumice", "int8", 0.0, 4.0)])
    assert only["speedup"] is None


def test_signal_to_noise():
    exact = np.ones(100, np.float32)
    assert signal_to_noise(exact, exact * np.float32(1.1)) == pytest.approx(20, abs=1e-4)
    assert signal_to_noise(exact, exact) == 120
    assert signal_to_noise(exact, -exact) < 0
    assert signal_to_noise(exact, exact * np.float32(np.nan)) == -120


@pytest.mark.slow
def test_the_demo_network_end_to_end(tmp_path, monkeypatch):
    out = tmp_path / "networks.json"
    arguments = ["--networks", "demo", "--zeros", "0.9", "--threads", "1", "--seconds", "0.1", "--json", str(out)]
    monkeypatch.setattr("sys.argv", ["networks_speed", *arguments])
    networks_speed.main()
    (run,) = json.loads(out.read_text())["runs"]
    assert [e["zeros"] for e in run["engines"] if e["family"] == "pumice"] == [0.9]
    assert all(e["median_ms"] > 0 for e in run["engines"])
