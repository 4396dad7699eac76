"""By what weights are compared when some of them have to go: the scores of ``GradualPruner``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Weights = dict[str, tuple[nn.Module, Tensor]]  # a layer and its parameter, by the weight's name


class Magnitude:
    """``|w|``, summed over a unit (Han et al., arXiv 1506.02626)."""

    across_layers = False  # whether the scores of different layers are made to be compared

    def __init__(self, weights: Weights) -> None:
        self.state: dict[str, Tensor] = {}  # what was gathered during training, by weight; it is saved
        self.handles: list[RemovableHandle] = []

    def of(self, name: str, weight: Tensor) -> Tensor:
        """How much each single weight matters, in the shape of ``weight``."""
        return weight.abs()

    def comparable(self, units: Tensor) -> Tensor:
        """The sums over one layer's units, made comparable with those of other layers."""
        return units


class Lamp(Magnitude):
    """The squared norm of a unit over that of all units in its layer that are no smaller (arXiv 2010.07611).

    It compares layers whose weights differ in scale, as batch normalization lets them, and no layer can empty.
    """

    across_layers = True

    def of(self, name: str, weight: Tensor) -> Tensor:  # noqa: D102
        return weight.square()

    def comparable(self, units: Tensor) -> Tensor:  # noqa: D102
        ordered, order = units.flatten().sort(stable=True)
        no_smaller = ordered.flip(0).cumsum(0).flip(0).clamp_min(1e-30)
        return torch.empty_like(ordered).scatter_(0, order, ordered / no_smaller).view_as(units)


class Movement(Magnitude):
    """``-sum of w * dL/dw`` over the backward passes so far (Sanh et al., arXiv 2005.07683).

    Weights that training moves towards zero go, whatever their size. The paper's learning rate of the scores is a
    constant factor, which no comparison sees, and is left out. Unlike there, what has gone does not come back.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self.state = {name: torch.zeros_like(weight) for name, (_, weight) in weights.items()}
        self.handles = [weight.register_hook(self._hook(name, weight)) for name, (_, weight) in weights.items()]

    def of(self, name: str, weight: Tensor) -> Tensor:  # noqa: D102
        return self.state[name]

    def _hook(self, name: str, weight: Tensor) -> Callable[[Tensor], None]:
        def accumulate(gradient: Tensor) -> None:  # before the optimiser moves the weight
            with torch.no_grad():
                self.state[name] -= weight * gradient

        return accumulate


class Activation(Magnitude):
    """``|w|`` times the root mean square of the input channel it reads (Wanda, Sun et al., arXiv 2306.11695).

    The mean is a moving one over training batches, each counting for a hundredth.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        for name, (layer, weight) in weights.items():
            groups = int(getattr(layer, "groups", 1))
            self.state[name] = torch.zeros(groups, weight.shape[1], device=weight.device)
            self.handles.append(layer.register_forward_pre_hook(self._hook(name, layer)))

    def of(self, name: str, weight: Tensor) -> Tensor:  # noqa: D102
        square = self.state[name]
        norms = square.sqrt().repeat_interleave(weight.shape[0] // square.shape[0], 0)  # [N, C]
        return weight.abs() * norms.view(*norms.shape, *[1] * (weight.ndim - 2)).to(weight.dtype)

    def _hook(self, name: str, watched: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if layer is not watched or not layer.training:  # a copy of the model takes its hooks along
                return
            data = inputs[0].detach()
            channels = data.movedim(1, -1) if isinstance(layer, nn.Conv1d | nn.Conv2d) else data
            square = channels.flatten(0, -2).float().square().mean(0).view_as(self.state[name])
            seen = bool(self.state[name].any())
            self.state[name] = torch.lerp(self.state[name], square, 0.01) if seen else square

        return observe


SCORES: dict[str, type[Magnitude]] = {
    "magnitude": Magnitude,
    "movement": Movement,
    "lamp": Lamp,
    "activation": Activation,
}
