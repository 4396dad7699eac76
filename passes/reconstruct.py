"""A pass that trains a pruned network, block by block and without labels, to give what the dense one gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm.ir import IRModule

from pumice.errors import UsageError
from pumice.module import weights_of, with_layers, with_weights
from pumice.passes.calibrate import without_ranges
from pumice.passes.quantization_plan import QuantizeSpec
from pumice.passes.segments import segments
from pumice.passes.sparsity import describe


@dataclass(frozen=True)
class ReconstructSpec:
    """How ``Reconstruct`` trains.

    Each block, of at least ``least_layers`` layers, takes ``steps`` minibatches of ``batch`` samples.
    ``learning_rate`` is the largest step of a weight, as a share of the root mean square of its tensor. ``int8``: the
    blocks compute with rounded weights and activations. ``whole``: a last stage of as many steps trains all parameters
    together on the model's outputs, at ``whole_rate``. At most ``limit`` samples are used, evenly spread, and no more
    than ``memory`` bytes hold the activations of; the share ``held_out`` of them decides which weights are kept.
    """

    steps: int = 400
    learning_rate: float = 0.02
    int8: bool = False
    whole: bool = False
    whole_rate: float = 0.005
    batch: int = 32
    least_layers: int = 2
    limit: int = 4096
    memory: int = 2**32
    held_out: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained by."""
        for name in ("steps", "learning_rate", "whole_rate", "batch", "least_layers", "memory"):
            if not getattr(self, name) > 0:
                raise UsageError(f"reconstruction with {name} = {getattr(self, name)}; it must be positive")
        if self.limit < 2 or not 0 < self.held_out < 1:
            raise UsageError(
                f"reconstruction on {self.limit} samples with the share {self.held_out} held out; it needs at least 2, "
                "and a share between 0 and 1"
            )


@tvm.transform.module_pass(opt_level=0, name="pumice.Reconstruct")
class Reconstruct:
    """``w -> w'``: weights, biases and norm parameters that bring each block's output back to the dense network's.

    Before, and after, with zeros at the same places of ``w`` and ``w'``::

        y = block(x, w)         x, y: as the pruned network computes them
        y = block(x, w')        nearer to what the dense network computes there

    ``main`` is cut into blocks where a single activation is live (``segments``). In order of execution, the squared
    error of each block's output against the dense network's at the same cut, on calibration samples, is minimised over
    the block's parameters. Its inputs are those of the network before it as it is by then, so it makes good for what
    was lost there too. Padding tokens count nothing. Zero weights stay exactly zero. A block keeps the weights that
    were best on held-out samples: where training did not help, those that it had. No labels are needed.

    With ``int8`` the weights of layers that ``Quantize`` will treat are rounded as it rounds them, and the activations
    that these read to uint8 over their range on the samples, with straight-through gradients: so the block learns to
    live with rounding. The weights that come back are float all the same. With ``whole`` the network is trained as one
    at last, its outputs against the dense network's: distillation.

    What was reached is in each layer's notes, in dB of noise against signal. The result depends on the samples and the
    seed, and in the last bits on the number of threads. The activations of all samples at a cut, of both
    networks, are held in memory.

    Sources: BRECQ (arXiv 2102.05426) for blocks as the unit; AdaRound (arXiv 2004.10568) for reconstruction on a few
    unlabelled samples; Optimal Brain Compression (arXiv 2208.11580) for a block's inputs from the compressed network.
    """

    def __init__(
        self,
        dense: IRModule,
        samples: Mapping[str, np.ndarray],
        spec: ReconstructSpec | None = None,
        quantize: QuantizeSpec | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """``dense``: the network before pruning, with as many blocks and the same shapes between them.

        ``samples`` are as for ``Calibrate``; ``quantize`` says, for ``int8``, which layers will stay float;
        ``progress(done, total)`` is called after each step.
        """
        self.dense = dense
        self.samples = samples
        self.spec = spec or ReconstructSpec()
        self.quantize = quantize or QuantizeSpec()
        self.progress = progress

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Train.

        Raises MissingDependencyError without PyTorch, UnsupportedError for an operator that has no rule there,
        ModelError where the samples do not fit the model, UsageError where ``dense`` does not or there is one sample.
        """
        if not segments(mod):
            return mod
        from pumice.passes.block_reconstruction import reconstruct  # PyTorch is an extra, and slow to import

        results = reconstruct(mod, self.dense, self.samples, self.spec, self.quantize, self.progress)
        weights = dict(weights_of(mod))
        records = describe(mod)
        for result in results:
            weights.update(result.weights)
            for layer in result.segment.layers:
                records[layer.name].notes.append(result.note(layer))
        return with_layers(without_ranges(with_weights(mod, weights)), records)
