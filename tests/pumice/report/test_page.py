import re
from dataclasses import replace

import pytest
from html_page import Page

from pumice.bench import Timing
from pumice.report import format_page
from pumice.report.data import Accuracy, File
from pumice.report.page import _number

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e" + "ü" * 10_000 + "'\"&amp;end"


def page(report):
    return Page(format_page(report, "pumice report model.so"))


def test_the_page_is_one_file_that_may_load_nothing(timed):
    text = format_page(timed, "pumice report model.so")
    parsed = Page(text)
    policy = next(meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    loading = {"src", "href", "action", "data", "srcset", "poster", "background"}
    links = [value for _, attributes in parsed.elements for name, value in attributes.items() if name in loading]
    assert links
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"@import|url\(|https?:", text)
    targets = {attributes.get("id") for _, attributes in parsed.elements}
    assert {link.removeprefix("#") for link in links} <= targets


def test_every_layer_is_there_with_its_reason(timed):
    parsed = page(timed)
    for layer in timed.layers:
        assert layer.kernel in parsed.text
        assert layer.reason in parsed.text
        assert layer.weight in parsed.text
        assert "×".join(map(str, layer.shape)) in parsed.text
        for note in layer.notes:
            assert note in parsed.text
    assert len(parsed.all("details")) == len(timed.layers)
    assert timed.manifest["source"]["sha256"] in parsed.text
    assert timed.library.sha256 in parsed.text


def test_names_and_reasons_of_a_model_are_text(with_layers):
    def hostile(index, entry):
        return {key: f"{HOSTILE}{index}" for key in ("name", "weight", "reason", "pruned_by")} | {"notes": [HOSTILE]}

    report = with_layers(hostile)
    report = replace(report, manifest={**report.manifest, "source": {"file": HOSTILE, "sha256": None}})
    text = format_page(report, HOSTILE)
    assert len(Page(text).all("script")) == 1  # the page's own
    assert not any(c in text for c in "\x1b\u202e")
    assert "ü" * 10_000 in text  # the whole name unfolds
    assert Page(text).all("details")


def test_noise_is_drawn_where_it_was_measured_and_said_where_not(with_layers):
    assert "was not measured" in page(with_layers(lambda index, entry: {"noise": {}})).text
    noise = {"pruning": 0.03, "weights": 0.01, "activations": 0.0}
    parsed = page(with_layers(lambda index, entry: {"noise": noise if index == 1 else {}}))
    widths = [float(r["width"].rstrip("%")) for r in parsed.all("rect") if r["class"] == "kind-pruning" and "x" in r]
    assert widths == [75.0]
    assert "noise from rounding of weights: 1.0 %" in parsed.text
    assert "4.0 %" in parsed.text


def test_what_was_not_measured_is_said(bare):
    text = page(bare).text
    assert "left out on request (--no-time)" in text
    assert "--eval SCRIPT.py:FUNCTION" in text
    assert "µs" not in text


@pytest.mark.parametrize(
    ("before", "after", "verdict", "tone"),
    [
        (0.9, 0.88, "0.02 lower than the original", "bad"),
        (0.9, 0.91, "0.01 higher than the original", "good"),
        (0.5, 0.5, "the same as the original", "good"),
        (None, 0.5, "--model MODEL.onnx", None),
    ],
)
def test_accuracy_before_and_after(bare, before, after, verdict, tone):
    parsed = page(replace(bare, accuracy=[Accuracy("top 1", before, after, "when it was compiled")]))
    assert verdict in parsed.text
    tones = [p["class"].split()[-1] for p in parsed.all("p") if p.get("class", "").startswith("verdict")]
    assert tones[:1] == ([tone] if tone else ["good"])  # the last is of the size


def test_more_numbers_than_cards_are_all_there(bare):
    numbers = [Accuracy(f"metric {index}", 0.5, 0.25, "when it was compiled") for index in range(5)]
    text = page(replace(bare, accuracy=numbers)).text
    assert all(f"metric {index}" in text for index in range(5))


@pytest.mark.parametrize(("ratio", "verdict"), [(4.0, "4.0 times as fast"), (0.5, "slower: takes 2.0 times as long")])
def test_time_before_and_after(timed, ratio, verdict):
    timings = [Timing("Pumice", 0.5, 0.4, 0.6, 9, 1.0), Timing("ONNX Runtime float32", 0.5 * ratio, 0.1, 9, 9, ratio)]
    text = page(replace(timed, timings=timings)).text
    assert verdict in text
    assert "0.500 ms" in text


def test_size_before_and_after(bare):
    original = File("model.onnx", 10 * bare.library.bytes, "00")
    assert "10 times smaller" in page(replace(bare, original=original)).text
    assert "2.0 times as large" in page(replace(bare, original=replace(original, bytes=bare.library.bytes // 2))).text
    assert "Size of the layers' weights" in page(bare).text


def test_a_model_without_layers_has_a_page(timed):
    steps = [replace(step, is_layer=False) for step in timed.profile.steps]
    report = replace(timed, manifest={**timed.manifest, "layers": []}, profile=replace(timed.profile, steps=steps))
    assert "no convolution" in page(report).text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.938, "0.9380"), (0.0, "0.0000"), (0.00123, "0.0012"), (93.8, "93.80"), (-1.5, "-1.500"), (12345.6, "12,346")],
)
def test_numbers_keep_four_digits(value, text):
    assert _number(value) == text
