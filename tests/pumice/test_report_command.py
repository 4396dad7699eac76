"""``pumice report`` from the outside: the file, the JSON, and what is wrong with a sentence."""

import json

import numpy as np
import pytest

from pumice.cli import main


@pytest.fixture
def run(capfd):
    """Run the command in this process: exit code, stdout, stderr."""

    def run(*arguments):
        code = main(["report", *map(str, arguments)])
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run


@pytest.fixture
def metric(tmp_path):
    path = tmp_path / "metric.py"
    path.write_text(
        "import numpy as np\n"
        "def accuracy(run): return run({'image': np.ones((1, 1, 8, 8), np.float32)})['logits'].max()\n"
        "def broken(run): raise ValueError('no labels')\n"
    )
    return path


def test_a_page_is_written_and_named(run, library, tmp_path, metric):
    page = tmp_path / "report.html"
    code, out, err = run(library, "-o", page, "--eval", f"{metric}:accuracy", "--seconds", "0.02", "--threads", "1")
    assert code == 0
    assert out.startswith(f"report: {page}, ")
    assert all(stage in err for stage in ("time whole inferences", "time each layer", "evaluate the library"))
    text = page.read_text("utf-8")
    assert text.startswith("<!doctype html>")
    assert "--eval" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metric.py", "report.html"]


def test_the_data_are_printed_as_json(run, library, tmp_path, samples):
    np.savez(tmp_path / "in.npz", image=samples[:1])
    code, out, _ = run(library, "--json", "-i", tmp_path / "in.npz", "--seconds", "0.02", "--threads", "1")
    data = json.loads(out)
    assert code == 0
    assert data["engines"][0]["median_ms"] > 0
    assert [layer["name"] for layer in data["manifest"]["layers"]] == ["stem", "conv", "fc"]
    assert len(data["profile"]["steps"]) == len(data["manifest"]["steps"])
    code, out, _ = run(library, "--json", "--no-time", "-o", tmp_path / "report.html")
    assert (code, json.loads(out)["profile"]) == (0, None)
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["LIBRARY"], 2, "-o report.html, or --json"),
        (["LIBRARY", "-o", "LIBRARY"], 2, "which would be lost"),
        (["LIBRARY", "-o", "MODEL", "--model", "MODEL"], 2, "which would be lost"),
        (["LIBRARY", "-o", "METRIC", "--eval", "METRIC:accuracy"], 2, "which would be lost"),
        (["LIBRARY", "-o", "FOLDER"], 2, "is a folder"),
        (["LIBRARY", "-o", "PAGE", "--eval", "METRIC"], 2, "SCRIPT.py:FUNCTION"),
        (["LIBRARY", "-o", "PAGE", "--eval", "METRIC:none"], 2, "it defines: accuracy, broken"),
        (["LIBRARY", "-o", "PAGE", "--no-time", "--eval", "METRIC:broken"], 2, "raised ValueError: no labels (line 3)"),
        (["LIBRARY", "-o", "PAGE", "--no-time", "--advice", "METRIC"], 2, "pumice advise"),
        (["LIBRARY", "-o", "PAGE", "-i", "METRIC"], 2, "is not an archive"),
        (["LIBRARY", "-o", "PAGE", "--threads", "0"], 2, "thread count is 0"),
        (["MODEL", "-o", "PAGE"], 3, "no ELF header"),
        (["none.so", "-o", "PAGE"], 3, "cannot be read"),
        (["LIBRARY", "-o", "PAGE", "--model", "METRIC"], 3, "metric.py"),
        (["LIBRARY", "-o", "PAGE", "--model", "none.onnx"], 3, "cannot be read"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(
    run, library, model_path, tmp_path, metric, arguments, code, message
):
    names = {"LIBRARY": library, "MODEL": model_path, "METRIC": metric, "PAGE": tmp_path / "report.html"}
    before = [path.read_bytes() for path in (library, model_path, metric)]
    filled = []
    for argument in arguments:
        head, colon, tail = argument.partition(":")
        filled.append(f"{names.get(head, head)}{colon}{tail}".replace("FOLDER", str(tmp_path)))
    found, out, err = run(*filled)
    assert (found, out) == (code, "")
    assert message in err.splitlines()[-1]
    assert [path.read_bytes() for path in (library, model_path, metric)] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metric.py"]


def test_a_library_for_another_machine_has_a_page(run, altered, tmp_path):
    page = tmp_path / "report.html"
    code, _, _ = run(altered('"popcnt"', '"flying"'), "-o", page)
    assert code == 0
    assert "this CPU lacks flying" in page.read_text("utf-8")
