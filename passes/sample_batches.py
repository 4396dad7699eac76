"""Running many samples at once without the padding of short ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from tvm import relax
from tvm.ir import GenericConst, IRModule

from pumice.module import weight_vars_of
from pumice.passes.dataflow import operands
from pumice.passes.numpy_operators import plain
from pumice.passes.rewriting import shape_of
from pumice.passes.segments import Binding
from pumice.passes.torch_graph import TorchGraph
from pumice.passes.torch_operators import Tensor, torch

_ROUNDED_LENGTH = 8  # tokens; samples of about one length share a minibatch
_CHECKED = 8  # samples
_SAME = 1e-4  # of the largest value: what float32 sums in another order differ by, and more


class SampleBatches:
    """Which samples run together, on how many tokens, and how much each token counts.

    ``real``: bool ``[samples, batch, tokens]``, False for padding; None where the model has no tokens. If ``crops``,
    trailing padding is cut off: every axis of a value that is as long as ``tokens`` becomes as long as the longest
    sample of the minibatch. ``padding_is_unread`` tells whether that changes no real position.
    """

    def __init__(self, count: int, real: np.ndarray | None, crops: bool = False) -> None:
        self.count = count
        self.real = None if real is None else torch.from_numpy(np.array(real, bool))
        self.crops = crops and real is not None
        self._lengths = torch.ones(count, dtype=torch.long)
        if self.real is not None:
            ends = torch.arange(1, self.real.shape[2] + 1)
            self._lengths = (self.real.any(1) * ends).amax(1).clamp(min=1)

    def lengths(self, chosen: Tensor) -> dict[int, int]:
        """For these samples, the sizes that become shorter: ``{128: 20}``."""
        if self.real is None or not self.crops:
            return {}
        return {self.real.shape[2]: int(self._lengths[chosen].max())}

    def split(self, chosen: Tensor, size: int, shuffle: torch.Generator | None = None) -> list[Tensor]:
        """Minibatches of ``size``, in a fixed order or shuffled; of about one length each if that saves work."""
        order = chosen if shuffle is None else chosen[torch.randperm(len(chosen), generator=shuffle)]
        if self.crops:
            rough = torch.div(self._lengths[order], _ROUNDED_LENGTH, rounding_mode="floor")
            order = order[torch.argsort(rough, stable=True)]
        parts = list(torch.split(order, size))
        return parts if shuffle is None else [parts[i] for i in torch.randperm(len(parts), generator=shuffle)]

    def mean_square(self, value: Tensor, declared: Sequence[int], chosen: Tensor) -> Tensor:
        """``[len(chosen)]``: of each sample of ``value [len(chosen), *shape]``, over its real tokens if it has any.

        ``declared`` is the shape in the graph, before any cropping.
        """
        square, real = value.square(), self._real(declared, chosen, value.shape[1:])
        if real is None:
            return square.flatten(1).mean(1)
        tokens = square.flatten(3).mean(3) if value.ndim > 3 else square
        return (tokens * real).sum((1, 2)) / real.sum((1, 2)).clamp(min=1)

    def ends(self, value: Tensor, declared: Sequence[int], chosen: Tensor) -> tuple[float, float]:
        """The least and the largest value, padding left out; 0 and 0 where all is padding."""
        real = self._real(declared, chosen, value.shape[1:])
        kept = value if real is None else value[real]
        return (float(kept.min()), float(kept.max())) if kept.numel() else (0.0, 0.0)

    def _real(self, declared: Sequence[int], chosen: Tensor, shape: Sequence[int]) -> Tensor | None:
        """Which tokens of these samples are real, ``[len(chosen), batch, tokens]``; None for other values."""
        if self.real is None or list(declared[:2]) != list(self.real.shape[1:]):
            return None
        return self.real[chosen, :, : shape[1]]

    def shortest(self, count: int) -> Tensor:
        """So many samples, the ones with the most padding first."""
        return torch.argsort(self._lengths, stable=True)[:count]


def cropped(value: Tensor, lengths: Mapping[int, int]) -> Tensor:
    """``value [samples, *shape]`` with these sizes of ``shape`` cut to others, from the front."""
    for axis in range(1, value.ndim):
        if value.shape[axis] in lengths:
            value = value.narrow(axis, 0, lengths[value.shape[axis]])
    return value


def padding_is_unread(
    mod: IRModule,
    bindings: Sequence[Binding],
    graph: TorchGraph,
    inputs: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    real: np.ndarray,
) -> bool:
    """Whether ``graph``, made of these ``bindings``, gives real tokens the same without the trailing padding.

    ``inputs`` are its values ``[samples, *shape]``. It must not have a weight, or a reshape, in which the number of
    tokens could mean something else; and it is tried, on the samples with the most padding.
    """
    tokens = real.shape[2]
    if not _is_told_apart(mod, bindings, tokens):
        return False
    batches = SampleBatches(len(real), real, crops=True)
    chosen = batches.shortest(_CHECKED)
    lengths = batches.lengths(chosen)
    with torch.no_grad():
        whole = graph([value[chosen] for value in inputs], weights)
        try:
            short = graph([cropped(value[chosen], lengths) for value in inputs], weights, lengths=lengths)
        except RuntimeError:  # shapes that do not go together: some axis is as long as the tokens and is not theirs
            return False
    for var, expected, found in zip(graph.outputs, whole, short, strict=True):
        expected = cropped(expected, lengths)
        if expected.shape != found.shape:
            return False
        difference = batches.mean_square(expected - found, shape_of(var), chosen)
        signal = batches.mean_square(expected, shape_of(var), chosen)
        if not bool((difference <= _SAME**2 * signal).all()):
            return False
    return True


def _is_told_apart(mod: IRModule, bindings: Sequence[Binding], tokens: int) -> bool:
    """Whether an axis of ``tokens`` can only be that of the tokens."""
    arguments = [argument for _, value in bindings if isinstance(value, relax.Call) for argument in value.args]
    if any(isinstance(a, relax.ShapeExpr) and list(plain(a)).count(tokens) > 1 for a in arguments):
        return False
    read = {operand for _, value in bindings for operand in operands(value)}
    known = [var for var in weight_vars_of(mod) if var in read] + [a for a in arguments if isinstance(a, GenericConst)]
    return all(tokens not in shape_of(each) for each in known)
