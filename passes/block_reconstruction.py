"""Going through a network block by block, the pruned and the dense one side by side: what ``Reconstruct`` runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from tvm import relax
from tvm.ir import IRModule

from pumice.errors import UsageError
from pumice.module import source_of
from pumice.passes.block_training import Block, Parameter, Rounding, Schedule, train
from pumice.passes.calibrate import Samples
from pumice.passes.dataflow import Dataflow, operator_name
from pumice.passes.layer_error import decibels
from pumice.passes.layers import Layer
from pumice.passes.observers import affine_uint8
from pumice.passes.padding import token_mask
from pumice.passes.quantization_plan import QuantizeSpec, plan_quantization
from pumice.passes.reconstruct import ReconstructSpec
from pumice.passes.rewriting import shape_of
from pumice.passes.sample_batches import SampleBatches, padding_is_unread
from pumice.passes.segments import Segment, independent, segments
from pumice.passes.torch_graph import TorchGraph, stacked, tensors_of
from pumice.passes.torch_operators import Tensor, fake_quantized, torch

_NORMS = {"nn.layer_norm", "nn.rms_norm", "nn.group_norm"}
_PROLOGUE = 64  # samples at a time, of what comes before the first layer
_WHOLE = 10**9  # layers: more than a network has, so that it is one segment


@dataclass(frozen=True)
class Reconstructed:
    """What became of one block."""

    segment: Segment
    stage: str  # the block, in words
    weights: dict[str, np.ndarray]  # those that were trained
    fixed: dict[str, str]  # those that were not, and why
    before: float  # noise-to-signal ratio of the output on held-out samples
    after: float
    held_out: int  # samples

    def note(self, layer: Layer) -> str:
        """What a layer's record says of it."""
        if layer.weight.name in self.fixed:
            return f"not reconstructed with {self.stage}: {self.fixed[layer.weight.name]}"
        before, after = (f"{-decibels(1, ratio):.1f} dB" for ratio in (self.before, self.after))
        where = f"on {self.held_out} held-out samples"
        if self.after < self.before:
            return f"reconstructed: error of {self.stage} {before} -> {after} {where}"
        return f"reconstruction did not lower the error of {self.stage} ({before} {where}): weights kept"


def reconstruct(
    mod: IRModule,
    dense: IRModule,
    samples: Mapping[str, np.ndarray],
    spec: ReconstructSpec,
    quantize: QuantizeSpec,
    progress: Callable[[int, int], None] | None = None,
) -> list[Reconstructed]:
    """Train every block of ``mod`` in order, then the whole if ``spec`` says so. Raises what ``Reconstruct`` does."""
    stages = [("the block", _pairs(mod, dense, spec.least_layers), spec.learning_rate)]
    if spec.whole:
        stages.append(("the whole network", _pairs(mod, dense, _WHOLE), spec.whole_rate))
    held = max(_held_bytes(segment) for _, pairs, _ in stages for segment, _ in pairs)
    chosen = _chosen(mod, samples, min(spec.limit, max(2, spec.memory // held)))
    pruned, original = _Network(mod, chosen), _Network(dense, chosen)
    mask = token_mask(mod)
    real = None if mask is None else np.stack([sample[mask] != 0 for sample in chosen])
    batches = SampleBatches(len(chosen), real, real is not None and original.padding_is_unread(real, stages[0][1]))
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(spec.seed))
    held_out = order[: min(len(chosen) - 1, max(1, round(spec.held_out * len(chosen))))]
    int8 = {layer.var for layer in plan_quantization(mod, quantize).layers} if spec.int8 else set()
    steps = _Counter(spec.steps * sum(len(pairs) for _, pairs, _ in stages), progress)
    results = []
    for stage, pairs, rate in stages:
        schedule = Schedule(spec.steps, rate, spec.batch, spec.seed)
        for segment, dense_segment in pairs:
            targets = original.block(dense_segment, batches).run_all(original.weights, spec.batch)
            block = pruned.block(segment, batches)
            rounding = _rounding(pruned, block, [layer for layer in segment.layers if layer.var in int8], spec.batch)
            parameters, fixed = _parameters(pruned, segment, set(rounding))
            weights = {name: pruned.weights[name] for name in block.graph.weights}
            weights.update({p.name: p.effective(p.start) for p in parameters if p.name in fixed})
            trained = [p for p in parameters if p.name not in fixed]
            outcome = train(block, targets, trained, weights, held_out, schedule, rounding, steps.count)
            weights.update({p.name: p.effective(outcome.weights[p.name]) for p in trained})
            pruned.values = _by_variable(segment.live_out, block.run_all(weights, spec.batch, rounding))
            pruned.weights.update(outcome.weights)
            original.values = _by_variable(dense_segment.live_out, targets)
            arrays = {name: value.numpy() for name, value in outcome.weights.items()}
            results.append(Reconstructed(segment, stage, arrays, fixed, outcome.before, outcome.after, len(held_out)))
    return results


class _Counter:
    """Tells how many steps are done."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._total = total
        self._done = 0
        self._progress = progress

    def count(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


class _Network:
    """One of the two networks: its weights by name as they are by now, and what the last block that was run gave."""

    def __init__(self, mod: IRModule, samples: Sequence[Mapping[str, np.ndarray]]) -> None:
        self.mod = mod
        self.flow = Dataflow(mod)
        self.weights = tensors_of(mod)
        self.values: dict[relax.Var, Tensor] = {}
        self._inputs = stacked(mod, samples)
        self._independent = independent(mod)

    def block(self, segment: Segment, batches: SampleBatches) -> Block:
        """The segment with its inputs: the cut before it, and what no layer computes."""
        graph = TorchGraph(self.mod, segment.bindings, segment.live_in, segment.live_out)
        rest = [var for var in segment.live_in if var not in self.values]
        first = TorchGraph(self.mod, self._independent, self.flow.inputs, rest)
        whole = SampleBatches(batches.count, None)
        found = _by_variable(rest, Block(first, self._inputs, whole).run_all(self.weights, _PROLOGUE) if rest else [])
        return Block(
            graph, [self.values[var] if var in self.values else found[var] for var in segment.live_in], batches
        )

    def padding_is_unread(self, real: np.ndarray, pairs: Sequence[tuple[Segment, Segment]]) -> bool:
        """Whether blocks give real tokens the same without trailing padding, tried on the network as a whole."""
        (whole,) = segments(self.mod, _WHOLE)
        cuts = [var for _, segment in pairs for var in segment.live_out]
        inputs = self.block(whole, SampleBatches(len(real), None)).inputs
        graph = TorchGraph(self.mod, whole.bindings, whole.live_in, cuts)
        return padding_is_unread(self.mod, whole.bindings, graph, inputs, self.weights, real)


def _chosen(mod: IRModule, samples: Mapping[str, np.ndarray], limit: int) -> list[dict[str, np.ndarray]]:
    arrays = Samples(mod, samples)
    if len(arrays) < 2:
        raise UsageError(
            f"{source_of(mod)}: reconstruction needs samples to train on and others to choose by; there is "
            f"{len(arrays)}, and a few hundred are good"
        )
    return list(islice(arrays, 0, None, -(-len(arrays) // limit)))


def _held_bytes(segment: Segment) -> int:
    """What is held of one sample while a block is trained: its inputs and outputs in either network, as float32."""
    variables = [*segment.live_in, *segment.live_out]
    return 2 * 4 * sum(math.prod(shape_of(var)) for var in variables)


def _pairs(mod: IRModule, dense: IRModule, least: int) -> list[tuple[Segment, Segment]]:
    """The blocks of both networks; raises UsageError where they do not correspond."""
    blocks, originals = segments(mod, least), segments(dense, least)
    shapes, wanted = ([[shape_of(var) for var in s.live_out] for s in each] for each in (blocks, originals))
    if shapes != wanted:
        raise UsageError(
            f"{source_of(mod)}: the dense network to reconstruct has {len(originals)} blocks, the pruned one "
            f"{len(blocks)}, or they differ in shape; give the very graph that was pruned"
        )
    return list(zip(blocks, originals, strict=True))


def _parameters(network: _Network, segment: Segment, rounded: set[relax.Var]) -> tuple[list[Parameter], dict[str, str]]:
    """What a block's layers and norms compute with, and which of it cannot be trained here, with the reason."""
    found: dict[relax.Var, int | None] = {}
    for layer in segment.layers:
        found[layer.weight] = layer.channel_axis if layer.var in rounded else None
        biased = network.flow.biased(layer.var)
        bias = network.flow.bias(biased, layer.var) if biased != layer.var else None
        if isinstance(bias, relax.Var):
            found[bias] = None
    for _, value in segment.bindings:
        if operator_name(value) in _NORMS:
            found.update({var: None for var in value.args[1:] if var in network.flow.weights})
    inside = {var for var, _ in segment.bindings}
    parameters, fixed = [], {}
    for var, axis in found.items():
        start = network.weights[var.name]
        if not start.is_floating_point():
            continue  # quantized in the model
        elsewhere = [user for user in network.flow.users[var] if user not in inside]
        if elsewhere:
            fixed[str(var.name)] = f"another block reads its weight too, for {elsewhere[0].name}"
        kept = start != 0
        mask = None if bool(kept.all()) or var not in {layer.weight for layer in segment.layers} else kept.float()
        parameters.append(Parameter(str(var.name), start, mask, axis))
    return parameters, fixed


def _rounding(network: _Network, block: Block, layers: Sequence[Layer], size: int) -> Rounding:
    """By the variable of each layer: its data to uint8, over the range that it has on the samples."""
    if not layers:
        return {}
    tensors = list(dict.fromkeys(layer.data for layer in layers))
    watched = Block(block.graph.to(tensors), block.inputs, block.batches)
    ends = {var: (0.0, 0.0) for var in tensors}
    with torch.no_grad():
        for chosen in block.batches.split(torch.arange(block.batches.count), size):
            for var, value in zip(tensors, watched.run(network.weights, chosen), strict=True):
                lo, hi = block.batches.ends(value, shape_of(var), chosen)
                ends[var] = min(lo, ends[var][0]), max(hi, ends[var][1])
    affine = {var: affine_uint8(*found) for var, found in ends.items()}
    return {layer.var: partial(_to_bytes, *affine[layer.data]) for layer in layers}


def _to_bytes(scale: float, zero_point: int, value: Tensor) -> Tensor:
    return fake_quantized(value, scale, zero_point, 0, 255)


def _by_variable(variables: Sequence[relax.Var], values: Sequence[Tensor]) -> dict[relax.Var, Tensor]:
    return dict(zip(variables, values, strict=True))
