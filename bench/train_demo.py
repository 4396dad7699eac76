"""Train the demo networks: one dense and two block-sparse Fashion-MNIST classifiers.

The data is the Debian package ``dataset-fashion-mnist`` (MIT licence, (c) Zalando SE):

    apt-get install dataset-fashion-mnist
    python bench/train_demo.py --data /usr/share/datasets/fashion-mnist --out pumice/demo

A small residual network is trained dense, then pruned in steps (the cubic schedule of
arXiv 1710.01878) while it learns from its dense self, to 80 % and then 90 % of its 1x4
blocks zero.  The last weights of every stage are kept: the test images are only ever
measured, never used to choose.  ``--out`` receives ``fashion.zip`` (three ONNX models),
``fashion.npz`` (images for the demo) and ``fashion.json`` (what was measured).
"""

import argparse
import copy
import gzip
import io
import json
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

SEED = 20240817
BATCH = 128
BLOCK = 4  # neighbouring input channels that are kept or dropped together
PAD = 2
PRUNE_EVERY = 50  # optimiser steps between two mask updates
PRUNE_SHARE = 0.5  # part of a pruning stage in which the masks still grow
TEMPERATURE, DISTIL = 3.0, 0.7
SPLITS = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
Bytes = npt.NDArray[np.uint8]


def read_idx(path: Path) -> Bytes:
    """Read one gzipped IDX file: a magic number that ends in the rank, the sizes, the bytes."""
    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", count=rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; each convolution is named so that ONNX shows it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        self.shortcut_bn: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut_bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut_bn(self.shortcut(x)))


class DemoNet(nn.Module):
    """A ResNet-14 with channel counts that are multiples of 16, halving early to stay cheap."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.stem_bn = nn.BatchNorm2d(16)
        self.stage1 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1))
        self.stage2 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1))
        self.stage3 = nn.Sequential(Block(64, 128, 2), Block(128, 128, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        logits: Tensor = self.classifier(torch.flatten(self.pool(x), 1))
        return logits


class BlockPruner:
    """Holds the masks of all convolutions but the stem and grows them together.

    Blocks of different layers are compared by LAMP (arXiv 2010.07611): the squared norm of a
    block over that of all blocks in its layer which are no smaller.  Batch normalisation makes
    the scale of a layer meaningless, so plain norms would not compare; and no layer can empty.
    """

    def __init__(self, model: DemoNet) -> None:
        self.weights = {
            name: module.weight
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d) and name != "stem"
        }
        self.masks = {name: torch.ones_like(w) for name, w in self.weights.items()}

    @torch.no_grad()
    def prune(self, sparsity: float) -> None:
        """Zero the lowest-scoring blocks of the network; never fewer than ``sparsity`` of them."""
        scores = {name: self._scores(weight) for name, weight in self.weights.items()}
        flat = torch.cat([score.flatten() for score in scores.values()])
        keep = torch.ones_like(flat)
        keep[torch.argsort(flat, stable=True)[: int(np.ceil(sparsity * len(flat)))]] = 0
        parts = torch.split(keep, [score.numel() for score in scores.values()])
        for (name, score), part in zip(scores.items(), parts, strict=True):
            self.masks[name].copy_(part.view_as(score).repeat_interleave(BLOCK, dim=1))
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Put the zeros back that an optimiser step has moved."""
        for name, weight in self.weights.items():
            weight.mul_(self.masks[name])

    @staticmethod
    def _scores(weight: Tensor) -> Tensor:
        squares = weight.unflatten(1, (-1, BLOCK)).square().sum(2)
        ordered, order = squares.flatten().sort(stable=True)
        no_smaller = ordered.flip(0).cumsum(0).flip(0).clamp_min(1e-30)
        scores = torch.empty_like(ordered)
        scores[order] = ordered / no_smaller
        return scores.view_as(squares)


def to_input(images: Tensor) -> Tensor:
    """Scale bytes to 0..1, the only preparation that a user of the models has to repeat."""
    return (images.float() / 255).unsqueeze(1).contiguous(memory_format=torch.channels_last)


def batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch of shuffled batches, each image randomly shifted and mirrored."""
    windows = F.pad(images, (PAD,) * 4).unfold(1, 28, 1).unfold(2, 28, 1)
    for index in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
        row, column = torch.randint(2 * PAD + 1, (2, BATCH))
        crops = windows[index, row, column]
        mirrored = torch.rand(BATCH, 1, 1) < 0.5
        yield to_input(torch.where(mirrored, crops.flip(2), crops)), labels[index]


def loss_of(logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
    """Cross entropy, mixed with the softened answers of the dense network where there is one."""
    hard = F.cross_entropy(logits, labels)
    if teacher is None:
        return hard
    target = F.log_softmax(teacher.float() / TEMPERATURE, 1)
    student = F.log_softmax(logits / TEMPERATURE, 1)
    soft = F.kl_div(student, target, reduction="batchmean", log_target=True) * TEMPERATURE**2
    return (1 - DISTIL) * hard + DISTIL * soft


def train(
    model: DemoNet,
    data: tuple[Tensor, Tensor],
    epochs: int,
    peak: float,
    teacher: DemoNet | None = None,
    pruning: tuple[BlockPruner, float, float] | None = None,
) -> None:
    """Run one stage; ``pruning`` is the pruner with the sparsities at its start and its end.

    Half-precision products (bfloat16) halve the time on a CPU; weights and updates stay float32.
    """
    optimiser = torch.optim.SGD(
        model.parameters(), lr=peak, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = epochs * (len(data[0]) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, steps, pct_start=0.2)
    step, start = 0, time.monotonic()
    for epoch in range(epochs):
        model.train()
        total = torch.zeros(())
        for images, labels in batches(*data):
            if pruning and step % PRUNE_EVERY == 0:
                pruner, first, last = pruning
                left = max(0.0, 1 - step / (PRUNE_SHARE * steps))
                pruner.prune(last + (first - last) * left**3)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images).float()
                with torch.no_grad():
                    taught = teacher(images) if teacher else None
            loss = loss_of(logits, labels, taught)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if pruning:
                pruning[0].apply()
            total += loss.detach()
            step += 1
        mean, seconds = float(total) * epochs / steps, time.monotonic() - start
        print(f"epoch {epoch + 1}/{epochs} loss {mean:.4f} {seconds:.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def evaluate(model: DemoNet, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy in percent on all test images and on the first 2,000, which the demo carries."""
    right = torch.cat([model(to_input(part)).argmax(1) for part in images.split(500)]) == labels
    return {str(n): 100 * float(right[:n].float().mean()) for n in (len(right), 2000)}


def folded(model: DemoNet) -> DemoNet:
    """Fold batch normalisation here: the exporter would do it too, but rename the weights."""
    result = copy.deepcopy(model).eval().to(memory_format=torch.contiguous_format)
    for module in result.modules():
        for name, norm in list(module.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                target = name.replace("bn", "conv") if name.startswith("bn") else name[: -len("_bn")]
                conv = getattr(module, target)
                setattr(module, target, fuse_conv_bn_eval(conv, norm))
                setattr(module, name, nn.Identity())
    return result


def to_onnx(model: DemoNet) -> bytes:
    """Export with the TorchScript exporter, which keeps module names and needs only onnx."""
    buffer = io.BytesIO()
    torch.onnx.export(
        folded(model),
        (torch.zeros(1, 1, 28, 28),),
        buffer,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )
    return buffer.getvalue()


def evaluate_onnx(exported: bytes, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The same two accuracies from the exported model, run by ONNX Runtime."""
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    pixels = to_input(images).contiguous().numpy()
    right = session.run(["logits"], {"image": pixels})[0].argmax(1) == labels.numpy()
    return {str(n): 100 * float(right[:n].mean()) for n in (len(right), 2000)}


def zero_blocks(model: DemoNet) -> dict[str, float]:
    """Percent of zero blocks in each prunable layer and, as ``all``, over these layers."""
    zero = {
        name: ~weight.detach().unflatten(1, (-1, BLOCK)).any(2)
        for name, weight in BlockPruner(model).weights.items()
    }
    zero["all"] = torch.cat([part.flatten() for part in zero.values()])
    return {name: 100 * float(part.double().mean()) for name, part in zero.items()}


def write_images(path: Path, train_images: Tensor, test: tuple[Tensor, Tensor]) -> None:
    """Store what the demo needs of the data: 2,000 test and 512 calibration images."""
    drawn = np.random.default_rng(SEED).choice(len(train_images), 512, replace=False)
    np.savez_compressed(
        path,
        test_images=test[0][:2000].numpy(),
        test_labels=test[1][:2000].numpy().astype(np.uint8),
        calibration_images=train_images[np.sort(drawn)].numpy(),
    )


def main() -> None:
    """Train the three networks in turn, measure them, and write them with the images."""
    parser = argparse.ArgumentParser(description="Train the demo networks on Fashion-MNIST.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the IDX .gz files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--checkpoints", type=Path, help="keep finished stages here; reuse them")
    parser.add_argument("--epochs", type=int, nargs=3, default=(24, 14, 16), help="per stage")
    args = parser.parse_args()
    torch.set_num_threads(2)
    split = {
        name: (torch.from_numpy(read_idx(args.data / x)), torch.from_numpy(read_idx(args.data / y)).long())
        for name, (x, y) in SPLITS.items()
    }
    torch.manual_seed(SEED)
    model = DemoNet().to(memory_format=torch.channels_last)
    teacher: DemoNet | None = None
    report: dict[str, dict[str, dict[str, float]]] = {}
    archive = zipfile.ZipFile(args.out / "fashion.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9)
