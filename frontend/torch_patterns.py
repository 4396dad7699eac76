"""What is pruned together, on tensors: the units of a pattern, as ``pumice/patterns.py`` defines them.

A weight ``[N, C, *kernel]`` is seen as ``[N, taps, C]``: one row an output channel, its input channels side by side at
each kernel position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.patterns import Pattern


def units(pattern: Pattern, values: Tensor) -> Tensor:
    """The sum of ``values [N, C, *kernel]`` over each block: ``[ceil(N / height), taps, ceil(C / width)]``.

    For N:M these are the values themselves, ``[N, taps, C]``.
    """
    rows = values.flatten(2).transpose(1, 2) if values.ndim > 2 else values.unsqueeze(1)
    height, width = pattern.height, pattern.width
    rows = F.pad(rows, (0, -rows.shape[2] % width, 0, 0, 0, -rows.shape[0] % height))
    return rows.unflatten(2, (-1, width)).unflatten(0, (-1, height)).sum((1, 4))


def expand(pattern: Pattern, values: Tensor, shape: Sequence[int]) -> Tensor:
    """What is said of each unit (as ``units`` returns them) for each weight of a weight of ``shape``."""
    rows = values.repeat_interleave(pattern.height, 0).repeat_interleave(pattern.width, 2)
    return rows[: shape[0], :, : shape[1]].transpose(1, 2).reshape(tuple(shape))


def lowest(pattern: Pattern, scores: Sequence[Tensor], share: float) -> list[Tensor]:
    """True for the units with the lowest scores of all layers together, ``share`` of all units in number.

    ``scores``: one tensor a layer, as ``units`` returns them. Of equals the first goes. With N:M only units that are
    not among the best N of their group can go, and a share of ``pattern.most`` takes all of them.
    """
    flat = torch.cat([_protected(pattern, score).flatten() for score in scores])
    removable = int((flat != math.inf).sum())
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(stable=True)[: round(min(share / pattern.most, 1) * removable)]] = True
    parts = chosen.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def _protected(pattern: Pattern, score: Tensor) -> Tensor:
    """Infinity for the best N of each group."""
    if pattern.group is None:
        return score
    n, m = pattern.group
    groups = F.pad(score, (0, -score.shape[2] % m), value=-math.inf).unflatten(2, (-1, m))
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    return groups.scatter(-1, best, math.inf).flatten(2)[..., : score.shape[2]]
