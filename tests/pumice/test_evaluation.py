import sys

import numpy as np
import pytest

from pumice.errors import ModelError, UsageError
from pumice.evaluation import load_metric


@pytest.fixture
def metric(tmp_path):
    """The function ``score`` of a script with this text."""

    def metric(text, name="score"):
        (tmp_path / "metric.py").write_text(text)
        return load_metric(f"{tmp_path / 'metric.py'}:{name}")

    return metric


def double(feed):
    return {"y": 2 * feed["x"]}


def test_the_function_runs_the_engine_and_its_number_has_its_name(metric):
    score = metric("import numpy as np\ndef score(run):\n    return run({'x': np.arange(4)})['y'].mean()")
    assert score(double) == {"score": 3.0}


def test_several_numbers_keep_their_names_and_order(metric):
    assert list(metric("def score(run): return {'top 5': 0.9, 'top 1': 1}")(double).items()) == [
        ("top 5", 0.9),
        ("top 1", 1.0),
    ]


@pytest.mark.parametrize("value", ["3", "True", "np.float32(3)", "np.array(3.0)", "np.float64(3)"])
def test_anything_that_is_a_number_is_taken(metric, value):
    assert metric(f"import numpy as np\ndef score(run): return {value}")(double)["score"] in (1.0, 3.0)


def test_a_script_named_by_a_relative_path_finds_the_folder_above(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "metric.py").write_text(
        "from pathlib import Path\nabove = Path(__file__).parents[1].name\ndef score(run): return len(above)"
    )
    monkeypatch.chdir(tmp_path / "inner")
    assert load_metric("metric.py:score")(double) == {"score": len(tmp_path.name)}


def test_the_script_imports_what_lies_beside_it(metric, tmp_path):
    (tmp_path / "labels_beside.py").write_text("answer = 42")
    before = list(sys.path)
    assert metric("def score(run):\n    import labels_beside\n    return labels_beside.answer")(double) == {"score": 42}
    assert metric("from labels_beside import answer\ndef score(run): return answer")(double) == {"score": 42}
    assert sys.path == before


def test_a_script_may_define_dataclasses(metric):
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
    assert metric(text + "def score(run): return A(3).x")(double) == {"score": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def score(run): return float('nan')", "returned nan"),
        ("def score(run): return float('inf')", "returned inf"),
        ("def score(run): return 'good'", "returned a str"),
        ("def score(run): pass", "returned a NoneType"),
        ("def score(run): return [1, 2]", "returned a list"),
        ("def score(run): return {}", "returned no number"),
        ("def score(run): return {'top 1': 1, 'top 5': None}", "returned a NoneType for 'top 5'"),
        ("x = 1\ndef score(run):\n    raise ValueError('a\\nb')", r"'score' raised ValueError: a \(line 3\)"),
        ("def score(run):\n    return run({})", r"'score' raised KeyError: 'x' \(line 2\)"),
        ("import sys\ndef score(run): sys.exit()", r"raised SystemExit \(line 2\)"),
    ],
)
def test_what_is_no_measure_is_one_sentence(metric, text, message):
    with pytest.raises(UsageError, match=message) as caught:
        metric(text)(double)
    assert "metric.py" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def other(run): pass", r"no function 'score' \(it defines: other\)"),
        ("score = 3", r"it defines: none"),
        ("import numpy\n1 / 0", r"the script raised ZeroDivisionError: division by zero \(line 2\)"),
        ("def (", r"SyntaxError.*\(line 1\)"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_script_that_cannot_be_loaded_is_one_sentence(metric, text, message):
    with pytest.raises(UsageError, match=message):
        metric(text)


@pytest.mark.parametrize("spec", ["metric.py", "", ":score", "metric.py:", "metric.py:a b", "none.py:score"])
def test_what_names_no_function_is_said(spec):
    with pytest.raises(UsageError, match="FUNCTION"):
        load_metric(spec)


def test_a_file_that_is_no_script_is_said(tmp_path):
    (tmp_path / "metric.npz").write_bytes(b"PK\0\x03")
    with pytest.raises(UsageError, match=r"metric\.npz: the script raised SyntaxError"):
        load_metric(f"{tmp_path / 'metric.npz'}:score")


def test_nothing_is_left_beside_the_script(metric, tmp_path):
    metric("def score(run): return 1")(double)
    assert [path.name for path in tmp_path.iterdir()] == ["metric.py"]


def test_what_the_engine_itself_raises_is_let_through(metric):
    def broken(feed):
        raise ModelError("model.so: is damaged")

    with pytest.raises(ModelError, match="is damaged"):
        metric("def score(run): return run({})")(broken)


def test_arrays_reach_the_engine_as_they_are(metric):
    seen = []
    metric("import numpy as np\ndef score(run):\n    run({'x': np.ones(3, np.float32)})\n    return 0")(
        lambda feed: seen.append(feed["x"]) or {}
    )
    np.testing.assert_array_equal(seen[0], np.ones(3, np.float32))
