"""Training one block of a network to give what the dense block gave: masked weights, Adam, a held-out measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tvm import relax

from pumice.passes.rewriting import dtype_of, shape_of
from pumice.passes.sample_batches import SampleBatches, cropped
from pumice.passes.torch_graph import TorchGraph
from pumice.passes.torch_operators import Tensor, fake_quantized, torch, torch_dtype

_EVALUATIONS = 10  # of the held-out error, over the steps
_SMALLEST = 1e-2  # what a tensor of zeros counts as, where steps are a share of its values

Rounding = Mapping[relax.Var, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Schedule:
    """How a block is trained.

    ``learning_rate`` is the largest step of a weight, as a share of the root mean square of its tensor: the tensors of
    one network differ in size by far more than one rate of Adam suits (compare LAMB, arXiv 1904.00962).
    """

    steps: int
    learning_rate: float
    batch: int  # samples
    seed: int


@dataclass(frozen=True)
class Parameter:
    """A weight that is trained, from ``start`` on: where ``mask`` is zero it stays zero.

    ``channel_axis`` runs over the output channels of a weight that will be rounded to int8; None: it stays float.
    """

    name: str
    start: Tensor
    mask: Tensor | None = None  # 0 and 1, of the weight's shape
    channel_axis: int | None = None

    def masked(self, value: Tensor) -> Tensor:
        """The weight that is kept."""
        return value if self.mask is None else value * self.mask

    def effective(self, value: Tensor) -> Tensor:
        """What the network computes with: masked, and rounded as ``Quantize`` will round it."""
        value = self.masked(value)
        if self.channel_axis is None:
            return value
        others = [axis for axis in range(value.ndim) if axis != self.channel_axis]
        largest = value.detach().abs().amax(others, keepdim=True)
        scale = torch.where(largest > 0, largest / 127, torch.ones(()))
        return fake_quantized(value, scale, 0, -127, 127)


@dataclass(frozen=True)
class Outcome:
    """The weights by name, and the noise-to-signal ratio on held-out samples before and after."""

    weights: dict[str, Tensor]
    before: float
    after: float


class Block:
    """A piece of a network and the values of all samples at its inputs, ``[samples, *shape]`` each."""

    def __init__(self, graph: TorchGraph, inputs: Sequence[Tensor], batches: SampleBatches) -> None:
        self.graph = graph
        self.inputs = inputs
        self.batches = batches

    def run(self, weights: Mapping[str, Tensor], chosen: Tensor, rounding: Rounding | None = None) -> list[Tensor]:
        """The outputs for these samples, without the padding that the batches cut off."""
        lengths = self.batches.lengths(chosen)
        values = [cropped(value[chosen], lengths) for value in self.inputs]
        return list(self.graph(values, weights, rounding, lengths))

    def run_all(self, weights: Mapping[str, Tensor], size: int, rounding: Rounding | None = None) -> list[Tensor]:
        """The outputs of all samples in their full shape, run ``size`` at a time; 0 where padding was cut off."""
        count = self.batches.count
        results = [torch.zeros(count, *shape_of(var), dtype=torch_dtype(dtype_of(var))) for var in self.graph.outputs]
        with torch.no_grad():
            for chosen in self.batches.split(torch.arange(count), size):
                for result, value in zip(results, self.run(weights, chosen, rounding), strict=True):
                    result[(chosen, *(slice(0, length) for length in value.shape[1:]))] = value
        return results


def train(
    block: Block,
    targets: Sequence[Tensor],
    parameters: Sequence[Parameter],
    fixed: Mapping[str, Tensor],
    held_out: Tensor,
    schedule: Schedule,
    rounding: Rounding | None = None,
    step_done: Callable[[], None] | None = None,
) -> Outcome:
    """Minimise the squared error of the block's outputs against ``targets`` over ``parameters``.

    ``targets`` are ``[samples, *shape]`` each, ``fixed`` the other weights by name, ``held_out`` the indices of samples
    that are not trained on. Each sample counts the same, whatever its length. Adam (arXiv 1412.6980) with a rate that
    falls to 0 along a cosine. The weights with the least error on the held-out samples are kept, the starting ones
    included: there it is never worse than it was.
    """
    error = _Error(block, targets, rounding)
    values = {p.name: p.start.clone().requires_grad_() for p in parameters}
    rates = [{"params": [value], "lr": schedule.learning_rate * _size(value)} for value in values.values()]
    optimizer = torch.optim.Adam(rates)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 + 0.5 * math.cos(math.pi * i / schedule.steps))

    def weights() -> dict[str, Tensor]:
        return {**fixed, **{p.name: p.effective(values[p.name]) for p in parameters}}

    best = {p.name: p.masked(p.start) for p in parameters}
    before = after = error.ratio(weights(), held_out, schedule.batch)
    for step, chosen in enumerate(_minibatches(block.batches, held_out, schedule), start=1):
        optimizer.zero_grad()
        error.loss(weights(), chosen).backward()
        optimizer.step()
        falling.step()
        if step % max(1, schedule.steps // _EVALUATIONS) == 0 or step == schedule.steps:
            now = error.ratio(weights(), held_out, schedule.batch)
            if now < after:
                after = now
                best = {p.name: p.masked(values[p.name]).detach().clone() for p in parameters}
        if step_done is not None:
            step_done()
    return Outcome(best, before, after)


class _Error:
    """How far a block's outputs are from their targets, relative to the targets' energy."""

    def __init__(self, block: Block, targets: Sequence[Tensor], rounding: Rounding | None) -> None:
        self._block = block
        self._targets = targets
        self._rounding = rounding
        everything = torch.arange(block.batches.count)
        self._signal = self._energies(targets, everything).mean(1).clamp(min=torch.finfo(torch.float32).tiny)

    def loss(self, weights: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        """The mean over these samples and all outputs, to be differentiated."""
        return (self._noise(weights, chosen).mean(1) / self._signal).mean()

    def ratio(self, weights: Mapping[str, Tensor], chosen: Tensor, size: int) -> float:
        """The same as a number, run ``size`` samples at a time."""
        total = 0.0
        with torch.no_grad():
            for part in self._block.batches.split(chosen, size):
                total += float(self.loss(weights, part)) * len(part)
        return total / len(chosen)

    def _noise(self, weights: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        lengths = self._block.batches.lengths(chosen)
        found = self._block.run(weights, chosen, self._rounding)
        return self._energies(
            [value - cropped(target[chosen], lengths) for value, target in zip(found, self._targets, strict=True)],
            chosen,
        )

    def _energies(self, values: Sequence[Tensor], chosen: Tensor) -> Tensor:
        """``[outputs, samples]``."""
        outputs = zip(values, self._block.graph.outputs, strict=True)
        return torch.stack([self._block.batches.mean_square(v, shape_of(var), chosen) for v, var in outputs])


def _minibatches(batches: SampleBatches, held_out: Tensor, schedule: Schedule) -> Iterator[Tensor]:
    """As many as there are steps, of samples that are not held out."""
    kept = torch.ones(batches.count, dtype=torch.bool)
    kept[held_out] = False
    trained = kept.nonzero().reshape(-1)
    generator = torch.Generator().manual_seed(schedule.seed)
    left = schedule.steps
    while left > 0:
        epoch = batches.split(trained, schedule.batch, generator)[:left]
        yield from epoch
        left -= len(epoch)


def _size(value: Tensor) -> float:
    """The root mean square of the values that are not zero: pruned ones say nothing about the others' size."""
    values = value.detach()[value.detach() != 0]
    return max(_SMALLEST, float(values.square().mean().sqrt())) if len(values) else _SMALLEST
