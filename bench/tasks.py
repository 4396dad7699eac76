"""Trained networks with real data: what is measured when accuracy counts.

A ``Task`` has the network's module, samples to calibrate on, and a measure of a module, run by Pumice's own kernels on
data that calibration never saw.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from sklearn.linear_model import LogisticRegression
from tvm.ir import IRModule

import pumice
from bench import engines
from bench.data_pictures import read_fashion, read_pictures, split
from bench.data_texts import calibration_texts, draw, read_snippets, read_word_pairs
from pumice.artifact import CompiledModel
from pumice.demo.run import read_data
from pumice.frontend import read_model
from pumice.passes.evaluate import Evaluator
from pumice.recipe import Recipe

Run = Callable[[Mapping[str, np.ndarray]], np.ndarray]
Measure = Callable[[Run], dict[str, float]]

_TOKENS = 64  # no text of the data is longer by much, and padding tells nothing
_CALIBRATE = 256
_LEARNED = 2000
_REVIEWS = 500


@dataclass(frozen=True)
class Task:
    """A network, ``measure(run)`` of any form of it, and the name of the measure that counts most.

    ``held`` measures on data that ``measure`` does not see either: for what was chosen by ``measure``.
    """

    model: onnx.ModelProto
    calibration: Mapping[str, np.ndarray]
    measure: Measure
    main: str
    held: Measure | None = None

    @cached_property
    def mod(self) -> IRModule:
        """The network as a module."""
        return read_model(self.model, self.inputs)

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """The shapes of one sample, by input name."""
        return {name: (1, *array.shape[1:]) for name, array in self.calibration.items()}


def evaluate(task: Task, mod: IRModule) -> dict[str, float]:
    """The measures of ``mod``, a form of the task's network with its first output."""
    evaluator = Evaluator(mod)
    return task.measure(lambda feed: next(iter(evaluator.run(feed).values())))


def compiled(task: Task, recipe: Recipe, threads: int | None) -> CompiledModel:
    """What ``pumice compile`` makes of the task's network, calibrated on its samples."""
    return pumice.compile(
        task.model,
        inputs=task.inputs,
        calibration=task.calibration,
        recipe=recipe,
        threads=threads,
        measure_errors=False,
        check=False,
    )


def demo(folder: Path, calibrate: int = _CALIBRATE) -> Task:
    """The dense demo network on Fashion-MNIST: 2,000 test images, calibrated on training images; 8,000 are held back.

    The project itself has 512 training images; more, and those held back, come from the package.
    """
    with TemporaryDirectory(prefix="pumice-") as scratch:
        data = read_data(Path(str(files("pumice.demo"))), Path(scratch))
        model = onnx.load(data.models["dense"])

    def measure(run: Run) -> dict[str, float]:
        logits = _all(run, {"image": data.test_images})
        return {"top-1": float(np.mean(logits.argmax(1) == data.test_labels))}

    def held(run: Run) -> dict[str, float]:
        images, labels = (array[len(data.test_images) :] for array in read_fashion(folder, "t10k"))
        return {"top-1, 8,000 others": float(np.mean(_all(run, {"image": images}).argmax(1) == labels))}

    calibration = data.calibration_images[:calibrate]
    if calibrate > len(calibration):
        calibration = read_fashion(folder, "train")[0][:calibrate]
    return Task(model, {"image": calibration}, measure, "top-1", held)


def mobilenet(folder: Path, calibrate: int = 128) -> Task:
    """MobileNetV2 on photographs: how often it names the class that the dense float network names."""
    from bench.mobilenet import agreement, load_network

    network = load_network(folder)
    calibrating, tested = split(read_pictures(folder).values())
    reference = engines.torch_engine(network).run_all({"image": tested})
    model = _exported(network, {"image": tested[:1]})

    def measure(run: Run) -> dict[str, float]:
        return agreement(_all(run, {"image": tested}), reference)

    return Task(model, {"image": calibrating[:calibrate]}, measure, "top-1 as float")


def minilm(folder: Path, calibrate: int = _CALIBRATE) -> Task:
    """MiniLM-L6 at 64 tokens: Spearman's correlation with people on WordSim-353, cosine to the dense embedding, and a
    head that was trained on dense embeddings, on 500 film reviews."""
    from bench.sentence_encoder import load_network, tokenize, word_correlation

    network, tokenizer = load_network(folder)
    tokenizer.enable_truncation(_TOKENS)
    tokenizer.enable_padding(length=_TOKENS)
    pairs = read_word_pairs(folder)
    everything = {word for each in pairs.values() for word in each.words()}
    texts = calibration_texts(folder, calibrate - calibrate // 2, calibrate // 2, everything)
    calibration = tokenize(tokenizer, texts)
    learned, held = draw(read_snippets(folder, "movieReview"), _LEARNED + _REVIEWS, _REVIEWS)
    learned, unseen = learned.part(0, _LEARNED), learned.part(_LEARNED, _LEARNED + _REVIEWS)
    dense = engines.torch_engine(network)
    head = LogisticRegression(C=10.0, max_iter=1000).fit(
        _all(dense.run, tokenize(tokenizer, learned.text)), learned.labels()
    )
    wordsim = pairs["WordSim-353"]
    words, feed = wordsim.words(), tokenize(tokenizer, held.text)
    word_feed, reference = tokenize(tokenizer, words), _all(dense.run, feed)

    def measure(run: Run) -> dict[str, float]:
        reviews = _all(run, feed)
        found = dict(zip(words, _all(run, word_feed), strict=True))
        return {
            "WordSim-353": word_correlation(wordsim, found),
            "cosine": float((reviews * reference).sum(1).mean()),
            "film reviews": float(np.mean(head.predict(reviews) == held.labels())),
        }

    def measure_held(run: Run) -> dict[str, float]:
        simlex, others = pairs["SimLex-999"], tokenize(tokenizer, unseen.text)
        found = _all(run, tokenize(tokenizer, simlex.words()))
        cosines = (_all(run, others) * _all(dense.run, others)).sum(1)
        return {
            "SimLex-999": word_correlation(simlex, dict(zip(simlex.words(), found, strict=True))),
            "cosine, 500 others": float(cosines.mean()),
        }

    model = _exported(network, next(engines.samples_of(calibration)))
    return Task(model, calibration, measure, "WordSim-353", measure_held)


TASKS: dict[str, Callable[..., Task]] = {"demo": demo, "minilm": minilm, "mobilenet": mobilenet}


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """``--data``, ``--networks`` and ``--json``."""
    parser.add_argument("--data", type=Path, required=True, help="folder of the downloaded packages (bench/README.md)")
    parser.add_argument("--networks", nargs="+", choices=TASKS, default=list(TASKS))


def _exported(network: object, sample: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    with TemporaryDirectory(prefix="pumice-") as scratch:
        return onnx.load(engines.export(network, sample, Path(scratch, "model.onnx")))  # type: ignore[arg-type]


def _all(run: Run, feed: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([run(sample) for sample in engines.samples_of(feed)])
