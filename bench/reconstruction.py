"""MiniLM-L6, pruned and then reconstructed block by block: what that brings back.

    python -m bench.reconstruction --data DIR --prune magnitude:1x4:0.5 --steps 200

The network has 128 tokens and is calibrated on 384 texts, half of them single words. Measured are Spearman's
correlation with people on word pairs, and the mean cosine to the dense network's embeddings: of the words of these
pairs, and of texts drawn as the calibration texts were, none of which is among them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tvm.ir import IRModule

from bench import engines
from bench.data_texts import calibration_texts, read_word_pairs
from bench.sentence_encoder import load_network, tokenize, word_correlation
from pumice.frontend import read_model
from pumice.module import layers_of
from pumice.passes import Calibrate, Prune, Quantize, Reconstruct, ReconstructSpec, SimplifyModel
from pumice.passes.evaluate import Evaluator

_TEXTS = 384
_HELD_OUT = 400


def main() -> None:
    """Measure dense, pruned, reconstructed; print the notes of the layers, then one line of JSON for each."""
    options = _options()
    network, tokenizer = load_network(options.data)
    pairs = read_word_pairs(options.data)
    words = sorted({word for each in pairs.values() for word in each.words()})
    texts = calibration_texts(options.data, _TEXTS // 2, _TEXTS // 2, set(words))
    others = calibration_texts(options.data, _HELD_OUT, _HELD_OUT, set(words))
    unseen = [text for text in others if text not in set(texts)][:: len(others) // _HELD_OUT]
    feeds = {"words": tokenize(tokenizer, words), "unseen texts": tokenize(tokenizer, unseen)}
    samples = tokenize(tokenizer, texts)
    with TemporaryDirectory(prefix="pumice-") as scratch:
        path = engines.export(network, next(engines.samples_of(samples)), Path(scratch, "minilm.onnx"))
        dense = SimplifyModel()(read_model(path))
    wanted = {name: _embeddings(dense, feed) for name, feed in feeds.items()}

    def measure(name: str, mod: IRModule) -> None:
        if options.int8:
            mod = Quantize()(Calibrate(samples, "minmax")(mod))
        found = {name: _embeddings(mod, feed) for name, feed in feeds.items()}
        by_word = dict(zip(words, found["words"], strict=True))
        row = {each: word_correlation(pairs[each], by_word) for each in pairs}
        row |= {f"cosine, {each}": float((found[each] * wanted[each]).sum(1).mean()) for each in feeds}
        print(json.dumps({"network": name, **{key: round(value, 3) for key, value in row.items()}}), flush=True)

    measure("dense", dense)
    pruned = Prune(options.prune, samples)(dense)
    measure(options.prune, pruned)
    began = time.perf_counter()
    spec = ReconstructSpec(steps=options.steps, int8=options.int8, whole=options.whole)
    after = Reconstruct(dense, samples, spec)(pruned)
    print(f"{spec}: {time.perf_counter() - began:.0f} s")
    for layer in layers_of(after).values():
        print(f"{layer.name}: {'; '.join(note for note in layer.notes if 'reconstruct' in note)}")
    measure("reconstructed", after)


def _embeddings(mod: IRModule, feed: Mapping[str, np.ndarray]) -> np.ndarray:
    evaluator = Evaluator(mod)
    return np.concatenate([next(iter(evaluator.run(sample).values())) for sample in engines.samples_of(feed)])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the downloaded packages (bench/README.md)")
    parser.add_argument("--prune", default="magnitude:1x4:0.5")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--int8", action="store_true", help="train with rounding, and measure in int8")
    parser.add_argument("--whole", action="store_true", help="the last stage too, on the whole network")
    return parser.parse_args()


if __name__ == "__main__":
    main()
