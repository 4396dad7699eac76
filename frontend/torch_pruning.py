"""Pruning in steps while a network trains: masks that grow on a schedule and hold against any optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pumice.errors import UsageError
from pumice.frontend.torch_patterns import expand, lowest, units
from pumice.frontend.torch_scores import SCORES
from pumice.patterns import Pattern


@dataclass(frozen=True)
class CubicSchedule:
    """The share of zeros at each step: fast at first, then slower (Zhu and Gupta, arXiv 1710.01878).

    ``initial`` at step ``start``, ``final`` from step ``end`` on, and between them
    ``final + (initial - final) * (1 - (step - start) / (end - start)) ** 3``. Masks change at ``start``, then after
    each ``every`` steps, and at ``end``.
    """

    start: int
    end: int
    initial: float
    final: float
    every: int = 1

    def __post_init__(self) -> None:
        """Refuse what is no schedule."""
        if not 0 <= self.start <= self.end or self.every < 1:
            raise UsageError(f"{self}: it needs 0 <= start <= end and every >= 1")
        if not 0 <= self.initial <= self.final <= 1:
            raise UsageError(f"{self}: it needs 0 <= initial <= final <= 1, the shares of zeros")

    def due(self, step: int) -> bool:
        """Whether masks change after this many steps of the optimiser."""
        inside = self.start <= step <= self.end
        return inside and ((step - self.start) % self.every == 0 or step == self.end)

    def share(self, step: int) -> float:
        """The share of zeros after this many steps."""
        if step >= self.end:
            return self.final
        left = 1 - max(step - self.start, 0) / (self.end - self.start)
        return self.final + (self.initial - self.final) * left**3


class GradualPruner:
    """Prunes a network while its owner trains it::

        pruner = GradualPruner(model, CubicSchedule(start=0, end=5000, initial=0.0, final=0.8, every=50))
        for batch in data:
            ...
            optimiser.step()
            pruner.step()

    Pruned are the weights of ``Linear``, ``Conv1d`` and ``Conv2d`` layers, in place: the network stays a plain one with
    zeros in it. ``step`` puts back the zeros that the optimiser moved (momentum, weight decay and Adam do) and lets the
    masks grow; loading a state dict into the model keeps them too. What is zero counts first, and stays zero.

    ``pattern`` is ``unstructured``, ``1x4``, ``4x1``, ``2x4``, ``4x4``, ``16x4`` (output x input channels at one kernel
    position) or ``N:M``. ``score`` says what goes first: ``magnitude`` (sum of absolute values), ``movement``, ``lamp``
    or ``activation``; their papers are in ``torch_scores.py``. With ``scope="layer"`` every layer gets the schedule's
    share of zeros, with ``scope="global"`` all layers together; by default it is global for ``lamp``, which compares
    layers, and by layer for the others. ``keep`` and ``only`` are globs of layer names; ``left_alone`` tells why a
    layer is not pruned.

    Raises UsageError for an unknown pattern, score or scope, for a share of zeros that the pattern does not have, for a
    glob without a layer, and where no layer is left.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: CubicSchedule,
        pattern: str = "1x4",
        score: str = "magnitude",
        scope: str | None = None,
        keep: Sequence[str] = (),
        only: Sequence[str] = ("*",),
    ) -> None:
        if score not in SCORES:
            raise UsageError(f"the score {score!r} is not known: give {', '.join(SCORES)}")
        if scope not in (None, "layer", "global") or (scope == "layer" and SCORES[score].across_layers):
            raise UsageError(f"scope {scope!r} with score {score!r}: give 'layer' (not with lamp) or 'global'")
        self.schedule, self.pattern = schedule, Pattern.parse(pattern)
        if schedule.final > self.pattern.most + 1e-9:
            raise UsageError(f"{schedule}: {pattern} leaves no more than {self.pattern.most:g} of the weights zero")
        self.steps = 0  # of the optimiser, so far
        self.left_alone: dict[str, str] = {}  # layer name -> why it is not pruned
        self._everywhere = scope == "global" or SCORES[score].across_layers
        self._layers = self._find_layers(model, keep, only)
        weights = {name: (layer, _weight(layer)) for name, layer in self._layers.items()}
        self._pruned = {name: torch.zeros_like(weight, dtype=torch.bool) for name, (_, weight) in weights.items()}
        self._score = SCORES[score](weights)
        self._handles = [
            layer.register_load_state_dict_post_hook(self._hook(name, layer)) for name, layer in self._layers.items()
        ]
        if schedule.due(0) and schedule.share(0) > 0:
            self._grow(schedule.share(0))

    def step(self) -> None:
        """To be called after each step of the optimiser: pruned weights are zero again, and more of them if due."""
        self.steps += 1
        self._apply()
        if self.schedule.due(self.steps):
            self._grow(self.schedule.share(self.steps))

    def masks(self) -> dict[str, np.ndarray]:
        """Booleans by weight name, False where pruned; ``np.savez(path, **masks)`` writes a file for ``--masks``.

        They have the shapes of the model's own weights, which a .pt2 file has too; in an ONNX file a linear layer's may
        be transposed.
        """
        return {name: (~pruned).cpu().numpy() for name, pruned in self._pruned.items()}

    def sparsity(self) -> dict[str, float]:
        """The share of units (blocks, or single weights) that are all zero: by weight name, and of all as ``all``."""
        with torch.no_grad():
            zero = {name: units(self.pattern, _weight(x).abs()) == 0 for name, x in self._layers.items()}
        zero["all"] = torch.cat([part.flatten() for part in zero.values()])
        return {name: float(part.double().mean()) for name, part in zero.items()}

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to go on: steps, masks, and what the score gathered, on the CPU."""
        copies = {"pruned": self._pruned, "score": self._score.state}
        return {"steps": self.steps} | {
            key: {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
            for key, tensors in copies.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another pruner of the same model, pattern and score was; masks are applied at once.

        Raises UsageError where its weights or their shapes are others.
        """
        for key, tensors in (("pruned", self._pruned), ("score", self._score.state)):
            stored = state[key]
            if {name: tensor.shape for name, tensor in stored.items()} != {n: t.shape for n, t in tensors.items()}:
                raise UsageError(
                    f"the pruner's saved state ({key}) is of other weights than the model's: make it with the same "
                    "layers and score as the one that was saved"
                )
            tensors.update({name: stored[name].to(tensor.device) for name, tensor in tensors.items()})
        self.steps = int(state["steps"])
        self._apply()

    def remove(self) -> None:
        """Leave the model as it is now: nothing holds its zeros any longer."""
        for handle in (*self._handles, *self._score.handles):
            handle.remove()

    def _find_layers(self, model: nn.Module, keep: Sequence[str], only: Sequence[str]) -> dict[str, nn.Module]:
        """The layers to prune by the names of their weights."""
        layers = {name: part for name, part in model.named_modules() if isinstance(part, _PRUNABLE)}
        for glob in (*keep, *only):
            if not any(fnmatchcase(name, glob) for name in layers):
                raise UsageError(f"{glob!r} names no layer of {type(model).__name__}; it has {', '.join(layers)}")
        owners: dict[int, list[str]] = {}
        for name, weight in model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(weight), []).append(name)
        for name, layer in layers.items():
            weight, kept_by = _weight(layer), next((g for g in keep if fnmatchcase(name, g)), None)
            if kept_by is not None:
                self.left_alone[name] = f"kept by {kept_by!r}"
            elif not any(fnmatchcase(name, g) for g in only):
                self.left_alone[name] = f"not among {', '.join(only)}"
            elif len(owners[id(weight)]) > 1:
                self.left_alone[name] = f"one tensor is the weight of {', '.join(owners[id(weight)])}"
            elif self.pattern.needs_neighbours and weight.shape[1] == 1:
                self.left_alone[name] = "each output channel reads one input channel: it has no neighbours"
        found = {f"{name}.weight": layer for name, layer in layers.items() if name not in self.left_alone}
        if not found:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.left_alone.items())
            raise UsageError(f"{type(model).__name__} has no layer to prune ({reasons or 'no Linear, Conv1d, Conv2d'})")
        return found

    @torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
    def _grow(self, share: float) -> None:
        """Zero the lowest ``share`` of all units."""
        scores = {name: self._unit_scores(name, _weight(layer)) for name, layer in self._layers.items()}
        if self._everywhere:
            zeros = lowest(self.pattern, list(scores.values()), share)
        else:
            zeros = [lowest(self.pattern, [score], share)[0] for score in scores.values()]
        for pruned, zero in zip(self._pruned.values(), zeros, strict=True):
            pruned |= expand(self.pattern, zero, pruned.shape)
        self._apply()

    def _unit_scores(self, name: str, weight: Tensor) -> Tensor:
        found = self._score.comparable(units(self.pattern, self._score.of(name, weight).float()))
        return found.masked_fill(units(self.pattern, weight.abs()) == 0, -torch.inf)

    def _apply(self) -> None:
        for name, layer in self._layers.items():
            _zero(layer, self._pruned[name])

    def _hook(self, name: str, pruned: nn.Module) -> Callable[[nn.Module, Any], None]:
        def zero_loaded(layer: nn.Module, incompatible: Any) -> None:
            if layer is pruned:  # a copy of the model, such as a teacher, takes its hooks along
                _zero(layer, self._pruned[name])

        return zero_loaded


_PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)


def _weight(layer: nn.Module) -> Tensor:
    """The parameter behind ``layer.weight``, also where fake quantization stands before it."""
    if parametrize.is_parametrized(layer, "weight"):
        original: Tensor = layer.parametrizations["weight"].original
        return original
    weight: Tensor = layer.weight
    return weight


@torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
def _zero(layer: nn.Module, pruned: Tensor) -> None:
    _weight(layer).masked_fill_(pruned, 0)  # not a product: that would make -0.0, and NaN of infinities
