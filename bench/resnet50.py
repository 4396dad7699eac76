"""ResNet-50: how long compiling takes and how fast the result runs. Its weights are random, so nothing is classified.

    python -m bench.resnet50 --data DIR

Random weights cost the compiler and the kernels what trained ones cost. ``--data`` is only where the model is written.
"""

from __future__ import annotations

import numpy as np

from bench import engines
from bench.mobilenet import agreement
from bench.networks import ResNet50, randomise

SEED = 20240817


def main() -> None:
    """Compile and time every engine; the signal-to-noise ratio against float is the check of the numbers."""
    parser = engines.arguments("ResNet-50 with random weights: compile time, time of one inference.")
    options = engines.parse(parser)
    network = ResNet50().eval()
    randomise(network, SEED)
    images = np.random.default_rng(SEED).standard_normal((24, 3, 224, 224), np.float32)
    calibration, feed = {"image": images[:16]}, {"image": images[16:]}
    reference = engines.torch_engine(network).run_all(feed)
    path = engines.export(network, next(engines.samples_of(feed)), options.work / "resnet50.onnx")
    contenders = []
    for name in options.engines:
        engine = engines.prepare(name, network, path, calibration, options)
        if name != "pumice-sparse":
            engine.metrics = {"SNR dB": agreement(engine.run_all(feed), reference)["SNR dB"]}
        contenders.append(engine)
    engines.time_together(contenders, next(engines.samples_of(feed)), options.seconds)
    engines.report(contenders, options, benchmark="ResNet-50")


if __name__ == "__main__":
    main()
