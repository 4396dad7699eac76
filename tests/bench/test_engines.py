import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from bench.engines import Engine, samples_of, table
from bench.mobilenet import agreement
from pumice.bench import Timing


def test_samples_of_cuts_every_array_along_its_first_axis():
    samples = list(samples_of({"a": np.arange(6).reshape(3, 2), "b": np.arange(3)}))
    assert [sample["a"].tolist() for sample in samples] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert [sample["b"].tolist() for sample in samples] == [[0], [1], [2]]


def test_run_all_joins_the_outputs():
    doubled = Engine("doubled", lambda feed: 2 * feed["a"])
    np.testing.assert_array_equal(doubled.run_all({"a": np.arange(4.0)}), 2 * np.arange(4.0))


def test_table_leaves_empty_what_was_not_measured():
    timing = Timing("first", 1.234, 1.1, 1.5, calls=10, ratio=1.0)
    first = Engine("first", lambda feed: feed["a"], metrics={"accuracy": 0.5}, timing=timing)
    lines = table([first, Engine("second", lambda feed: feed["a"])]).splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        "first",
        "0.5000",
        "1.234",
        "1.100",
        "1.500",
        "",
        "",
    ]
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == ["second", "", "", "", "", "", ""]
    assert len({len(line) for line in lines}) == 1


def test_agreement_against_counting_by_hand():
    reference = np.eye(6, dtype=np.float32)[:3] * 3
    logits = reference.copy()
    logits[1] = [4, 3, 0, 0, 0, 0]  # first class wrong, right one second
    logits[2] = [5, 5, -1, 5, 5, 5]  # right one last
    found = agreement(logits, reference)
    assert found["top-1 as float"] == pytest.approx(1 / 3)
    assert found["in top-5"] == pytest.approx(2 / 3)
    assert found["SNR dB"] == pytest.approx(10 * np.log10(27 / (16 + 141)), abs=1e-4)
