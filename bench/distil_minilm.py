"""A sentence encoder pruned while it learns from its dense self, on texts without labels.

    OMP_WAIT_POLICY=passive python -m bench.distil_minilm --data DIR --work DIR/distil

MiniLM-L6 is pruned in steps to 80 % of the 1x4 blocks of every linear layer of its encoder. It learns to give the
embeddings and hidden states of the dense network, on the sentences of vaderSentiment, on parts of them, and on single
words out of them; the film reviews that ``bench.sentence_encoder`` tests on and the words of its word pairs are left
out. In the last part its layers round as int8 does. Embedding tables are not trained.

Training goes on from ``WORK/checkpoint.pt`` where there is one. At the end ``WORK/minilm80.onnx`` is written (inputs of
1x128), compiled by Pumice, and measured as ``bench.sentence_encoder`` does, beside the dense network, into
``WORK/results.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from bench import engines
from bench.data_texts import calibration_texts, draw, read_snippets, read_word_pairs, unlabelled_texts, vocabulary
from bench.sentence_encoder import TOKENS, Tasks, load_network, tokenize, word_correlation
from pumice.frontend.torch import (
    CubicSchedule,
    GradualPruner,
    HiddenStates,
    add_fake_quantization,
    embedding_loss,
    export,
    hidden_state_loss,
    similarity_loss,
)

SEED = 20240817
CHARACTERS, TEXTS = 4000, 128  # the most in one batch, padded
BUCKET = 4000  # texts that are sorted by length together
HELD_OUT = 512  # sentences that are never learned from: how near is the student to its teacher?
LAYERS = "encoder.layer.*"  # their outputs are compared
DISTANT, RELATIVE = 2.0, 10.0  # weights of the two losses on embeddings; hidden states count once
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """How the network is trained; shares are of all steps."""

    epochs: int = 8
    rate: float = 3e-4  # the highest learning rate
    zeros: float = 0.8
    pattern: str = "1x4"
    score: str = "activation"
    pruned: float = 0.5  # by when the last blocks are pruned
    int8: float = 0.75  # from when on layers round


class Texts:
    """What is learned from, and the held-out sentences, all tokenized without padding."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        tokenizer.no_padding()
        self.pairs = read_word_pairs(folder)
        _, tested = draw(read_snippets(folder, "movieReview"), 2000, 2000)
        sentences = unlabelled_texts(folder, set(tested.text))
        evaluated = {word for pairs in self.pairs.values() for word in pairs.words()}
        self._words = vocabulary(sentences, evaluated | {word.lower() for word in evaluated})
        random.Random(SEED).shuffle(sentences)
        self._held, self._sentences = sentences[:HELD_OUT], sentences[HELD_OUT:]
        self._evaluated = sorted(evaluated)
        self._tokenizer = tokenizer

    def batches(self, epoch: int) -> list[list[str]]:
        """One epoch: all sentences, parts of a quarter of them, a third of the words; alike in length, shuffled."""
        draws = random.Random(SEED + 1 + epoch)
        texts = list(self._sentences)
        texts += [_part(text, draws) for text in draws.sample(self._sentences, len(self._sentences) // 4)]
        texts += draws.sample(self._words, len(self._words) // 3)
        draws.shuffle(texts)
        parts = (sorted(texts[i : i + BUCKET], key=len) for i in range(0, len(texts), BUCKET))
        batches = [batch for part in parts for batch in _cut(part)]
        draws.shuffle(batches)
        return batches

    def pad(self, texts: list[str]) -> Batch:
        """The network's inputs, padded to the longest of the texts."""
        encoded = self._tokenizer.encode_batch(texts)
        ids = torch.zeros(len(texts), max(len(text.ids) for text in encoded), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(encoded):
            ids[row, : len(text.ids)] = torch.tensor(text.ids)
            mask[row, : len(text.ids)] = 1
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}

    def compare(self, student: nn.Module, teacher: nn.Module) -> str:
        """The cosine to the teacher's embeddings of the held-out sentences, and the correlations on word pairs."""
        parts = _cut(sorted(self._held, key=len))
        training = student.training
        student.eval()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            near = [1 - embedding_loss(student(**x), teacher(**x)) for x in map(self.pad, parts)]
            vectors = student(**self.pad(self._evaluated)).float().numpy()
        student.train(training)
        embeddings = dict(zip(self._evaluated, vectors, strict=True))
        words = ", ".join(f"{name} {word_correlation(pairs, embeddings):.4f}" for name, pairs in self.pairs.items())
        return f"held-out cosine {torch.stack(near).mean():.4f}, {words}"


def _cut(texts: list[str]) -> list[list[str]]:
    """Batches of texts that come in order of length: as many as fit when all are as long as the last."""
    batches: list[list[str]] = [[]]
    for text in texts:
        full = (len(batches[-1]) + 1) * len(text) > CHARACTERS or len(batches[-1]) == TEXTS
        if full and batches[-1]:
            batches.append([])
        batches[-1].append(text)
    return batches


def _part(text: str, draws: random.Random) -> str:
    """Two to eight neighbouring words of a text."""
    words = text.split()
    length = draws.randint(2, 8)
    start = draws.randint(0, max(0, len(words) - length))
    return " ".join(words[start : start + length])


class Training:
    """Everything that a checkpoint holds, and the step that moves it on."""

    def __init__(self, teacher: nn.Module, plan: Plan, steps: int) -> None:
        self.teacher, self.plan, self.total, self.done = teacher, plan, steps, 0
        self.student = copy.deepcopy(teacher).train()
        for layer in teacher.modules():
            if isinstance(layer, nn.Linear):
                layer.bfloat16()  # as autocast would at every step
        self.student.get_submodule("embeddings").requires_grad_(False)
        learned = [weight for weight in self.student.parameters() if weight.requires_grad]
        self.optimiser = torch.optim.AdamW(learned, plan.rate, weight_decay=0.0, fused=True)
        schedule = CubicSchedule(start=50, end=round(plan.pruned * steps), initial=0.0, final=plan.zeros, every=50)
        self.pruner = GradualPruner(self.student, schedule, plan.pattern, plan.score)
        self._wanted = HiddenStates(self.teacher, [LAYERS])
        self._states = HiddenStates(self.student, [LAYERS])

    def step(self, batch: Batch) -> dict[str, float]:
        """Learn from one batch; the parts of the loss."""
        if self.done == self._int8_from():
            add_fake_quantization(self.student)
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate()
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                wanted = self.teacher(**batch)
            embedding = self.student(**batch)
        mask = batch["attention_mask"]
        hidden = [hidden_state_loss(self._states[name], self._wanted[name], mask) for name in self._states]
        parts = {
            "hidden": torch.stack(hidden).mean(),
            "distant": embedding_loss(embedding, wanted),
            "relative": similarity_loss(embedding, wanted),
        }
        loss = parts["hidden"] + DISTANT * parts["distant"] + RELATIVE * parts["relative"]
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.pruner.step()
        self.done += 1
        return {"loss": loss.item()} | {name: part.item() for name, part in parts.items()}

    def save(self, path: Path) -> None:
        """Write a checkpoint; one that is there is replaced only by a whole one."""
        parts = {name: getattr(self, name).state_dict() for name in ("student", "optimiser", "pruner")}
        torch.save({"plan": asdict(self.plan), "done": self.done, **parts}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of the same plan; ValueError where it is of another."""
        stored = torch.load(path, weights_only=True)
        if stored["plan"] != asdict(self.plan):
            raise ValueError(f"{path} is of the plan {stored['plan']}, not {asdict(self.plan)}: give another --work")
        self.done = stored["done"]
        if self.done > self._int8_from():
            add_fake_quantization(self.student)
        for name in ("student", "optimiser", "pruner"):
            getattr(self, name).load_state_dict(stored[name])

    def _int8_from(self) -> int:
        return round(self.plan.int8 * self.total)

    def _rate(self) -> float:
        """A rise over the first 200 steps, level until the last blocks are pruned, then down to nothing."""
        rise = min(1.0, (self.done + 1) / 200)
        fall = (self.total - self.done) / (self.total * (1 - self.plan.pruned))
        return self.plan.rate * min(rise, fall, 1.0)


def train(teacher: nn.Module, texts: Texts, plan: Plan, checkpoint: Path) -> nn.Module:
    """The student after all epochs; a checkpoint is written after every 200 steps."""
    batches = [batch for epoch in range(plan.epochs) for batch in texts.batches(epoch)]
    training = Training(teacher, plan, len(batches))
    if checkpoint.exists():
        training.load(checkpoint)
        print(f"going on from step {training.done}", flush=True)
    started, first = time.perf_counter(), training.done
    for batch in batches[first:]:
        losses = training.step(texts.pad(batch))
        if training.done % 50 == 0:
            pace = (time.perf_counter() - started) / (training.done - first)
            shown = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
            zeros, left = training.pruner.sparsity()["all"], pace * (training.total - training.done) / 60
            at = f"{training.done}/{training.total}"
            print(f"{at} {shown} zeros {zeros:.3f}, {pace:.2f} s a step, {left:.0f} min left", flush=True)
        if training.done % 200 == 0 or training.done == training.total:
            training.save(checkpoint)
            print(texts.compare(training.student, teacher), flush=True)
    return training.student


def measure(student: nn.Module, path: Path, options: argparse.Namespace) -> list[engines.Engine]:
    """Dense and pruned, in float and compiled with int8, on the tasks of ``bench.sentence_encoder``."""
    network, tokenizer = load_network(options.data)
    snippets = draw(read_snippets(options.data, "movieReview"), 2000, 2000)
    tasks = Tasks(options.data, tokenizer, snippets, engines.torch_engine(network))
    texts = calibration_texts(options.data, 128, 128, set(tasks.words))
    calibration = tokenize(tokenizer, texts)
    dense = export_fixed(network, tokenizer, options.work / "minilm.onnx")
    made = {"calibration": calibration, "target": options.target, "threads": options.threads}
    measured = []
    for name, plain, file in (("dense", network, dense), ("pruned", student, path)):
        for engine in (engines.torch_engine(plain), engines.pumice_engine(file, "int8", **made)):
            engine.name = f"{name}, {engine.name}"
            engine.metrics = tasks.measure(engine)
            print(engine.name, engine.metrics, flush=True)
            measured.append(engine)
    return measured


def export_fixed(network: nn.Module, tokenizer: Tokenizer, path: Path) -> Path:
    """The network as ONNX, for one text of 128 tokens."""
    feed = tokenize(tokenizer, ["a text"])
    example = tuple(torch.from_numpy(array) for array in feed.values())
    return export(network, example, path, input_names=list(feed), output_names=["output"])


def main() -> None:
    """Train, or go on; then export and measure."""
    parser = argparse.ArgumentParser(description="Prune MiniLM-L6 while it learns from its dense self.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the downloaded packages (bench/README.md)")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint and the results")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", default="native", help="what Pumice compiles for")
    defaults = Plan()
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{value} by default")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    torch.set_num_threads(options.threads)
    plan = Plan(**{name: getattr(options, name) for name in asdict(defaults)})
    teacher, tokenizer = load_network(options.data)
    student = train(teacher, Texts(options.data, tokenizer), plan, options.work / "checkpoint.pt")
    _, tokenizer = load_network(options.data)  # padded to 128 tokens again
    path = export_fixed(student, tokenizer, options.work / f"minilm{100 * plan.zeros:.0f}.onnx")
    rows = [engine.to_json() for engine in measure(student, path, options)]
    command = " ".join(["python -m bench.distil_minilm", *sys.argv[1:]])
    results = {"command": command, "plan": asdict(plan), "tokens": TOKENS, "engines": rows}
    (options.work / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
