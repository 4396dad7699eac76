"""What each step of quantization gains, in signal-to-noise ratio of the outputs on samples that did not calibrate.

    python -m bench.quantization minilm --data DIR
    python -m bench.quantization mobilenet --data DIR

Every line is a recipe, carried out and run by the same code that compiles models, but without writing a library. For
MobileNetV2 the layers whose rounding does the most harm are listed too, and what float budgets make of that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import tvm
from tvm.ir import IRModule

from bench import engines, mobilenet, sentence_encoder
from bench.data_pictures import read_pictures, split
from bench.data_texts import calibration_texts, draw, read_snippets, read_word_pairs
from bench.tables import markdown
from pumice.frontend import read_model
from pumice.passes import Calibrate, CorrectBias, EqualizeChannels, Quantize, QuantizeSpec, SimplifyModel
from pumice.passes.calibrate import Samples
from pumice.passes.evaluate import Evaluator
from pumice.passes.keep_float import choose_float
from pumice.passes.layer_error import decibels
from pumice.passes.layers import find_layers
from pumice.passes.sensitivity import output_noise
from pumice.prepare import prepare
from pumice.recipe import Recipe
from pumice.stages import Stages

_BUDGETS = (0.02, 0.05, 0.1, 0.2)
_RECIPES = {
    "int8": Recipe(),
    "smoothed, strength 0.5": Recipe(smooth=0.5),
    "smoothed, strengths searched": Recipe(smooth="search"),
    "smoothed, searched, GPTQ": Recipe(smooth="search", rounding="gptq"),
}


def run_all(mod: IRModule, feed: Mapping[str, np.ndarray]) -> np.ndarray:
    """The first output for every sample, joined."""
    evaluator = Evaluator(mod)
    return np.concatenate([next(iter(evaluator.run(sample).values())) for sample in Samples(mod, feed)])


def snr(values: np.ndarray, reference: np.ndarray) -> float:
    """In decibels."""
    return decibels(float(np.square(reference).sum()), float(np.square(values - reference).sum()))


def minilm(options: argparse.Namespace) -> str:
    """Embeddings of film reviews and of the words of WordSim-353."""
    network, tokenizer = sentence_encoder.load_network(options.data)
    pairs = read_word_pairs(options.data)
    half = options.calibrate // 2
    evaluated = {word for each in pairs.values() for word in each.words()}
    texts = calibration_texts(options.data, options.calibrate - half, half, evaluated)
    calibration = sentence_encoder.tokenize(tokenizer, texts)
    _, held = draw(read_snippets(options.data, "movieReview"), 0, options.test)
    words = pairs["WordSim-353"].words()
    feeds = [sentence_encoder.tokenize(tokenizer, each) for each in (held.text, words)]
    path = engines.export(network, next(engines.samples_of(calibration)), options.work / "minilm.onnx")

    def line(mod: IRModule, references: list[np.ndarray]) -> list[str]:
        reviews, embedded = (run_all(mod, feed) for feed in feeds)
        correlation = sentence_encoder.word_correlation(pairs["WordSim-353"], dict(zip(words, embedded, strict=True)))
        cosine = float((reviews * references[0]).sum(1).mean())
        ratios = [snr(values, reference) for values, reference in zip((reviews, embedded), references, strict=True)]
        return [*(f"{ratio:.2f}" for ratio in ratios), f"{cosine:.4f}", f"{correlation:.4f}"]

    exact = prepare(read_model(path, None), Recipe(quantize=False), None, None, Stages(None))
    references = [run_all(exact, feed) for feed in feeds]
    rows = [["", "reviews, dB", "words, dB", "cosine of reviews", "WordSim-353"], ["float", *line(exact, references)]]
    for name, recipe in _RECIPES.items():
        mod = prepare(read_model(path, None), recipe, calibration, None, Stages(None))
        rows.append([name, *line(mod, references)])
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    return markdown(rows)


def mobilenet_v2(options: argparse.Namespace) -> str:
    """Logits of photographs: the noisiest layers, and what float budgets leave."""
    calibrating, tested = split(read_pictures(options.data).values())
    calibration, feed = {"image": calibrating[: options.calibrate]}, {"image": tested[: options.test]}
    network = mobilenet.load_network(options.data)
    path = engines.export(network, {"image": tested[:1]}, options.work / "mobilenet_v2.onnx")
    mod = tvm.transform.Sequential([SimplifyModel(), EqualizeChannels(calibration)])(read_model(path, None))

    def quantized(spec: QuantizeSpec) -> IRModule:
        return CorrectBias(mod, calibration)(Quantize(spec)(Calibrate(calibration, "minmax", spec)(mod)))

    reference = run_all(mod, feed)
    whole = quantized(QuantizeSpec())
    noise = output_noise(mod, whole, calibration)
    layers = find_layers(mod)
    costs = {layer.name: layer.macs / sum(each.macs for each in layers) for layer in layers}
    noisiest = [["layer", "noise of the logits, dB", "multiply-adds"]]
    for name in sorted(noise, key=noise.__getitem__, reverse=True)[:12]:
        noisiest.append([name, f"{-decibels(1.0, noise[name]):.1f}", f"{costs[name]:.1%}"])
    rows = [["float budget", "layers", "spent", "foretold, dB", "SNR dB", "top-1 as float", "in top-5"]]
    for budget in (0.0, *_BUDGETS):
        chosen = choose_float(noise, costs, budget)
        found = mobilenet.agreement(run_all(quantized(QuantizeSpec(reasons=chosen)), feed), reference)
        foretold = decibels(1.0, sum(noise[name] for name in noise if name not in chosen))
        spent = sum(costs[name] for name in chosen)
        rates = [f"{found['top-1 as float']:.1%}", f"{found['in top-5']:.1%}"]
        rows.append(
            [f"{budget:.0%}", str(len(chosen)), f"{spent:.1%}", f"{foretold:.1f}", f"{found['SNR dB']:.1f}", *rates]
        )
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    return f"{markdown(noisiest)}\n\n{markdown(rows)}"


_SUBJECTS: dict[str, Callable[[argparse.Namespace], str]] = {"minilm": minilm, "mobilenet": mobilenet_v2}


def main() -> None:
    """Print the table of one model."""
    parser = argparse.ArgumentParser(description="What each step of quantization gains.")
    parser.add_argument("subject", choices=_SUBJECTS)
    parser.add_argument("--data", type=Path, required=True, help="folder of the downloaded packages (bench/README.md)")
    parser.add_argument("--work", type=Path, help="folder for exported models (default: DATA/work)")
    parser.add_argument("--calibrate", type=int, default=128, help="samples to calibrate on")
    parser.add_argument("--test", type=int, default=128, help="samples to measure on")
    options = parser.parse_args()
    options.work = options.work or options.data / "work"
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print(_SUBJECTS[options.subject](options))


if __name__ == "__main__":
    main()
