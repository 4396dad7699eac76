"""The report's last sections: the commands that make its numbers again, versions and hashes, and the words used."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from pumice.loader import clean
from pumice.report.data import Report
from pumice.report.markup import Markup, element

# Fields of a recipe that are options of the same name, and what they are where they are not given.
_USUAL: dict[str, Any] = {
    "permute": False,
    "reconstruct": 0,
    "reconstruct_whole": False,
    "float_budget": 0.0,
    "smooth": 0.0,
    "calibration_method": "minmax",
    "rounding": "nearest",
}
_WORDS = {
    "accuracy": "How good the model's answers are, by a measure of the user's; higher is better.",
    "inference": "One run of the model on one input.",
    "median": "Half of the runs were faster, half slower: the usual run, which a rare hiccup does not change.",
    "weights": "The numbers that the model learned; most of its size.",
    "sparse, zeros": "Weights that are zero need not be stored or multiplied; pruning makes unimportant ones zero.",
    "int8": "Whole numbers of 8 bits in place of 32-bit fractions: a quarter of the size, and faster.",
    "1x4 block": "Four neighbouring weights that are zero together, or not: what processors can skip at full speed.",
    "dense": "Computed with all weights, zero or not: faster where few are zero.",
    "calibration data": "Typical inputs from which the ranges of numbers were learned when the model was compiled.",
    "noise": "By how much a layer's output differs from the original's, as a share of its energy, when all before "
    "that layer is exact.",
    "SNR": "Signal to noise, in dB: what rounding to int8 has brought by then in the whole network, without pruning; "
    "20 dB is noise of 1 % of the energy, 30 dB of 0.1 %.",
    "kernel": "The piece of machine code that computes one layer.",
    "frontier": "The settings that no other setting beats in both time and quality.",
}


def reproduce_section(report: Report, command: str) -> Markup:
    """Commands, versions, target, hashes."""
    source, target = report.manifest["source"], report.manifest["target"]
    versions = report.manifest["versions"]
    library = _quote(report.library.name)
    commands = [compile_command(report), f"pumice verify {library}", f"pumice bench {library} --layers", command]
    needs = ", ".join(target["features"]) or "nothing more"
    facts = {
        "source": f"{source['file']}, SHA-256 {source.get('sha256') or 'unknown (compiled from a live model)'}",
        "library": f"{report.library.name}, {report.library.bytes:,} bytes, SHA-256 {report.library.sha256}",
        "original": f"{report.original.name}, {report.original.bytes:,} bytes, SHA-256 {report.original.sha256}"
        if report.original
        else "",
        "target": f"{target['name']}: {target['architecture']}, needs {needs}",
        "timed on": _timed(report),
        "versions": ", ".join(f"{name} {number}" for name, number in sorted(versions.items())),
    }
    listed = [part for name, text in facts.items() if text for part in (element("dt", name), element("dd", text))]
    return element(
        "section",
        element("h2", "How to make these numbers again"),
        element("p", "CALIBRATION.npz stands for the calibration data, which a library does not name.", class_="quiet"),
        element("pre", *(part for line in commands for part in (line, Markup("\n")))),
        element("dl", *listed),
        id="reproduce",
    )


def glossary_section() -> Markup:
    """The words of the first part, a line each."""
    entries = [part for word, text in _WORDS.items() for part in (element("dt", word), element("dd", text))]
    return element("section", element("h2", "Words"), element("dl", *entries), id="words")


def compile_command(report: Report) -> str:
    """The command line that compiled the library, by the options in its manifest."""
    manifest = report.manifest
    options: Mapping[str, Any] = manifest.get("options", {})
    words = ["pumice", "compile", str(manifest["source"]["file"]), "-o", report.library.name]
    words += ["--target", str(manifest["target"]["name"])]
    for entry in manifest["inputs"]:
        words += ["--input", f"{entry['name']}={'x'.join(map(str, entry['shape']))}"] if entry["shape"] else []
    words += _recipe_words(options.get("recipe", {}))
    for name in ("tuning_db", "threads"):
        words += [f"--{name.replace('_', '-')}", str(options[name])] if options.get(name) else []
    by_file = (layer.pruned_by for layer in report.layers if layer.pruned_by.startswith("side file "))
    files = {by.removeprefix("side file ").partition(", then ")[0] for by in by_file}
    words += [word for file in sorted(files) for word in ("--masks", file)]
    libc = options.get("libc")
    words += [] if not libc else ["--musl"] if libc == "musl" else ["--glibc", str(libc).removeprefix("glibc-")]
    for name, switch in (
        ("measure_errors", "--no-layer-errors"),
        ("check", "--no-check"),
    ):
        words += [] if options.get(name, True) else [switch]
    return " ".join(map(_quote, words))


def _recipe_words(recipe: Mapping[str, Any]) -> list[str]:
    """The options that say what the recipe in a manifest says."""
    words = ["--calibration", "CALIBRATION.npz"] if recipe.get("quantize", True) else ["--no-quantize"]
    for name, several in (("prune", recipe.get("prune", ())), ("keep-float", recipe.get("keep_float", ()))):
        words += [word for value in several for word in (f"--{name}", str(value))]
    for name, usual in _USUAL.items():
        value = recipe.get(name, usual)
        if value != usual:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    for name, switch in (("equalize", "--no-equalize"), ("correct_bias", "--no-correct-bias")):
        words += [] if recipe.get(name, True) else [switch]
    return words


def _timed(report: Report) -> str:
    if not report.profile:
        return ""
    counts = f"{report.timings[0].calls:,} inferences and {report.profile.rounds:,} rounds of steps"
    return f"{report.place}; medians of {counts}"


def _quote(word: str) -> str:
    return shlex.quote(clean(word))
