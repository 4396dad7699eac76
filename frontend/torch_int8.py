"""Training for int8: a network that computes in float what it will compute once its layers are quantized."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pumice.errors import UsageError

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_INPUT = "input_quantizer"
_TINY = torch.finfo(torch.float32).tiny
_SMALLEST_SCALE = 2.0**-100


def add_fake_quantization(model: nn.Module, keep: Sequence[str] = ()) -> list[str]:
    """Let every ``Linear``, ``Conv1d`` and ``Conv2d`` of ``model`` round its weight and its input as int8 does.

    In place; the names of the layers are returned. The weight is rounded to int8 by output channel, the input to uint8
    by tensor, and gradients pass as if nothing was rounded (Jacob et al., arXiv 1712.05877). These are the numbers of
    ``Quantize`` (docs/arithmetic.md), but for the ranges of inputs: those are moving averages over training batches,
    and stand still in evaluation mode. ``keep``: globs of the layers that will stay float.

    The state dict has other names meanwhile, so to resume, call this before it is loaded; ``remove_fake_quantization``
    takes it out again. Raises UsageError for a glob without a layer, and where the model has it already.
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, _LAYERS)}
    for glob in keep:
        if not any(fnmatchcase(name, glob) for name in layers):
            raise UsageError(f"keep={glob!r} names no layer of {type(model).__name__}; it has {', '.join(layers)}")
    chosen = {name: part for name, part in layers.items() if not any(fnmatchcase(name, glob) for glob in keep)}
    for name, layer in chosen.items():
        if hasattr(layer, _INPUT):
            raise UsageError(f"{type(model).__name__}: the layer {name} has fake quantization already")
    for layer in chosen.values():
        parametrize.register_parametrization(layer, "weight", RoundWeight())
        quantizer = RoundInput().to(layer.parametrizations["weight"].original.device).train(layer.training)
        layer.add_module(_INPUT, quantizer)
        layer.register_forward_pre_hook(_round_input)
    return list(chosen)


def remove_fake_quantization(model: nn.Module) -> None:
    """Make ``model`` plain again, in place, with the float weights that lay behind the rounded ones."""
    for layer in model.modules():
        quantizer = getattr(layer, _INPUT, None)
        if not isinstance(quantizer, RoundInput):
            continue
        for key, hook in list(layer._forward_pre_hooks.items()):
            if hook is _round_input:
                del layer._forward_pre_hooks[key]
        delattr(layer, _INPUT)
        original = layer.parametrizations["weight"].original
        # torch's remove_parametrizations deletes the property from a class that copies of the layer share.
        layer.__class__ = type(layer).__bases__[0]
        del layer._modules["parametrizations"]
        layer.register_parameter("weight", original)


class RoundWeight(nn.Module):  # type: ignore[misc, unused-ignore]
    """A weight ``[N, ...]`` as the values that int8 has for it: ``round(w / s) * s``, ``s = max|w| / 127`` by channel.

    Zeros stay zero.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight; its gradient is the weight's."""
        largest = weight.detach().abs().flatten(1).amax(1).view(-1, *[1] * (weight.ndim - 1))
        scale = torch.where(largest > 0, (largest / 127).clamp_min(_TINY), torch.ones_like(largest))
        rounded: Tensor = _Round.apply(weight, scale, torch.zeros_like(scale), -127, 127)
        return rounded


class RoundInput(nn.Module):  # type: ignore[misc, unused-ignore]
    """A tensor as the values that uint8 has for it, over the moving average of its range widened to hold 0.

    The first training batch sets the range ``[low, high]``, each later one counts for a hundredth. Values outside are
    clamped and get no gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("range", torch.zeros(2))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, data: Tensor) -> Tensor:
        """The rounded tensor, in the type of ``data``."""
        if self.training:
            seen = torch.stack(torch.aminmax(data.detach().float()))
            self.range.copy_(torch.lerp(self.range, seen, 0.01) if self.batches else seen)
            self.batches += 1
        low, high = self.range[0].clamp(max=0), self.range[1].clamp(min=0)
        scale = torch.where(high > low, ((high - low) / 255).clamp_min(_SMALLEST_SCALE), torch.ones_like(low))
        zero_point = torch.round(-low / scale).clamp(0, 255)
        rounded: Tensor = _Round.apply(data, scale, zero_point, 0, 255)
        return rounded


class _Round(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
    """``(clamp(round(x / scale) + zero, least, most) - zero) * scale``, straight through for gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, least: int, most: int) -> Tensor:
        steps = torch.round(x.float() / scale) + zero
        ctx.save_for_backward((steps >= least) & (steps <= most))
        result: Tensor = ((steps.clamp(least, most) - zero) * scale).to(x.dtype)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None, None


def _round_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (getattr(layer, _INPUT)(inputs[0]), *inputs[1:])
