"""Train the demo networks: one dense and two block-sparse Fashion-MNIST classifiers.

The data is the Debian package ``dataset-fashion-mnist`` (MIT licence, (c) Zalando SE):

    apt-get install dataset-fashion-mnist
    python bench/train_demo.py --data /usr/share/datasets/fashion-mnist --out pumice/demo

A residual network is trained dense, then pruned in steps (arXiv 1710.01878) while it learns from its dense
self, to 80 % and then 90 % of its 1x4 blocks zero.  The last weights of a stage are kept: test images are only
measured.  ``--out`` receives ``fashion.zip`` (three ONNX models) and ``fashion.npz`` (images for the demo).
"""

import argparse
import copy
import gzip
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pumice.frontend.torch import CubicSchedule, GradualPruner, soft_label_loss

SEED, BATCH, PAD = 20240817, 128, 2
PRUNE_EVERY, PRUNE_SHARE = 50, 0.5  # steps between two mask updates; part of a stage that has updates
TEMPERATURE, DISTIL = 3.0, 0.7
KEPT = ("stem", "classifier")  # layers that are not pruned
# Name, share of zero blocks, epochs, highest learning rate.
STAGES = [("dense", 0.0, 24, 0.2), ("blocks80", 0.8, 4, 0.1), ("blocks90", 0.9, 5, 0.1)]
Samples = tuple[Tensor, Tensor]


def read_idx(path: Path) -> Tensor:
    """Read one gzipped IDX file: a magic number that ends in the rank, the sizes, the bytes."""
    raw = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + sizes.nbytes).reshape(sizes).copy())


def read_split(folder: Path, prefix: str) -> Samples:
    """Read the images and the labels whose file names start with ``prefix``."""
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    return images, read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz").long()


class Block(nn.Module):  # type: ignore[misc, unused-ignore]
    """Two 3x3 convolutions and a shortcut; each convolution is named so that ONNX shows it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv1_bn = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.conv2_bn = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.shortcut_bn = nn.Identity() if same else nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Add the two paths."""
        inner = self.conv2_bn(self.conv2(F.relu(self.conv1_bn(self.conv1(x)))))
        return F.relu(inner + self.shortcut_bn(self.shortcut(x)))


class DemoNet(nn.Module):  # type: ignore[misc, unused-ignore]
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
        """Return the ten logits of each image."""
        x = F.relu(self.stem_bn(self.stem(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        logits: Tensor = self.classifier(torch.flatten(self.pool(x), 1))
        return logits


def to_input(images: Tensor) -> Tensor:
    """Scale bytes to 0..1, the only preparation that a user of the models has to repeat."""
    return (images.float() / 255).unsqueeze(1).contiguous(memory_format=torch.channels_last)


def batches(images: Tensor, labels: Tensor) -> Iterator[Samples]:
    """Yield one epoch of shuffled batches, each image randomly shifted and mirrored."""
    windows = F.pad(images, (PAD,) * 4).unfold(1, 28, 1).unfold(2, 28, 1)
    for index in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
        row, column = torch.randint(2 * PAD + 1, (2, BATCH))
        crops = windows[index, row, column]
        mirrored = torch.rand(BATCH, 1, 1) < 0.5
        yield to_input(torch.where(mirrored, crops.flip(2), crops)), labels[index]


def loss_of(model: DemoNet, teacher: DemoNet | None, images: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, mixed with the softened answers of the dense network where there is one."""
    with torch.autocast("cpu", torch.bfloat16):  # halves the time; weights and updates stay float32
        logits = model(images).float()
    hard = F.cross_entropy(logits, labels)
    if not teacher:
        return hard
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        answers = teacher(images).float()
    return (1 - DISTIL) * hard + DISTIL * soft_label_loss(logits, answers, TEMPERATURE)


def train(
    model: DemoNet, teacher: DemoNet | None, data: Samples, epochs: int, peak: float, zeros: tuple[float, float]
) -> None:
    """Run one stage, in which the share of zero blocks rises from one of ``zeros`` to the other.

    Blocks of different layers are compared by LAMP (arXiv 2010.07611): batch normalisation makes the scale of a layer
    meaningless, so plain norms would not compare; and no layer can empty.
    """
    steps = epochs * (len(data[0]) // BATCH)
    schedule = CubicSchedule(0, int(PRUNE_SHARE * steps), *zeros, PRUNE_EVERY)
    pruner = GradualPruner(model, schedule, "1x4", "lamp", keep=KEPT)
    optimiser = torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9, nesterov=True, weight_decay=5e-4)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, steps, pct_start=0.2)
    model.train()
    stream = (batch for _ in range(epochs) for batch in batches(*data))
    for step, (images, labels) in enumerate(stream):
        loss = loss_of(model, teacher, images, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
        pruner.step()
        if step % 200 == 0:
            print(f"step {step}/{steps} loss {loss.item():.4f}", flush=True)
    model.eval()
    print({layer: round(share, 2) for layer, share in pruner.sparsity().items()}, flush=True)


def to_onnx(model: DemoNet) -> bytes:
    """Fold batch normalisation, then export; the exporter would fold too, but rename the weights."""
    folded, buffer = copy.deepcopy(model).to(memory_format=torch.contiguous_format), io.BytesIO()
    for module in folded.modules():
        for name, norm in list(module.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                conv = name.removesuffix("_bn")
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), norm))
                setattr(module, name, nn.Identity())
    for weight in folded.parameters():
        weight.data.add_(0.0)  # masks and folding leave zeros with a minus sign
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    names = {"input_names": ["image"], "output_names": ["logits"], "dynamic_axes": axes}
    torch.onnx.export(folded, (torch.zeros(1, 1, 28, 28),), buffer, **names, opset_version=17, dynamo=False)
    return buffer.getvalue()


def measure(name: str, model: DemoNet, exported: bytes, test: Samples) -> None:
    """Print the sparsity, and the accuracy of torch and of ONNX Runtime on all and on 2,000 images."""
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    parts = [to_input(part).contiguous() for part in test[0].split(500)]
    with torch.no_grad():
        logits = {"torch": torch.cat([model(part) for part in parts])}
    ran = [session.run(["logits"], {"image": part.numpy()})[0] for part in parts]
    logits["onnxruntime"] = torch.from_numpy(np.concatenate(ran))
    for runtime, values in logits.items():
        right = 100 * (values.argmax(1) == test[1]).double()
        print(f"{name} {runtime}: all {right.mean():.2f} %, first 2,000 {right[:2000].mean():.2f} %")


def write_images(path: Path, images: Tensor, test: Samples) -> None:
    """Store what the demo needs of the data: 2,000 test and 512 calibration images."""
    drawn = np.sort(np.random.default_rng(SEED).choice(len(images), 512, replace=False))
    shown, answers, calibration = test[0][:2000].numpy(), test[1][:2000].byte().numpy(), images[drawn].numpy()
    np.savez_compressed(path, test_images=shown, test_labels=answers, calibration_images=calibration)


def main() -> None:
    """Train the three networks in turn, measure them, and write them with the images."""
    parser = argparse.ArgumentParser(description="Train the demo networks on Fashion-MNIST.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the four IDX .gz files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    args = parser.parse_args()
    data, test = read_split(args.data, "train"), read_split(args.data, "t10k")
    torch.manual_seed(SEED)
    model, teacher, reached = DemoNet().to(memory_format=torch.channels_last), None, 0.0
    write_images(args.out / "fashion.npz", data[0], test)
    with zipfile.ZipFile(args.out / "fashion.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, sparsity, epochs, peak in STAGES:
            train(model, teacher, data, epochs, peak, (reached, sparsity))
            exported = to_onnx(model)
            measure(name, model, exported, test)
            archive.writestr(f"{name}.onnx", exported)
            teacher, reached = teacher or copy.deepcopy(model), sparsity
            torch.manual_seed(SEED)  # so that the length of one stage does not change the next one's draws


if __name__ == "__main__":
    main()
