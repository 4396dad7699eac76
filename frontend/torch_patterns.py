"""What is pruned together, on tensors: single weights, blocks of output x input channels, and N:M groups."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.errors import UsageError

BLOCKS = {"unstructured": (1, 1), "1x4": (1, 4), "4x1": (4, 1), "2x4": (2, 4), "4x4": (4, 4), "16x4": (16, 4)}


@dataclass(frozen=True)
class Pattern:
    """A shape of zeros; its *units* are what is kept or dropped as a whole.

    A weight ``[N, C, *kernel]`` is seen as ``[N, taps, C]``: one row an output channel, its input channels side by
    side at each kernel position. A block is ``height`` output by ``width`` input channels at one position; where a
    channel count is no multiple of it, the last block is shorter. With ``kept``, a unit is a single weight, and of any
    ``width`` neighbouring input channels the ``kept`` best stay (N:M, arXiv 2104.08378); so does a shorter last group.
    """

    height: int = 1
    width: int = 1
    kept: int | None = None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """``unstructured``, ``1x4``, ``4x1``, ``2x4``, ``4x4``, ``16x4`` or ``N:M``; UsageError for any other."""
        if text in BLOCKS:
            return cls(*BLOCKS[text])
        match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
        if not match or not 0 < int(match[1]) < int(match[2]):
            raise UsageError(f"pruning pattern {text!r} is not known: give {', '.join(BLOCKS)} or N:M with N < M")
        return cls(1, int(match[2]), int(match[1]))

    @property
    def most(self) -> float:
        """The largest share of zeros that the pattern has."""
        return 1.0 if self.kept is None else 1 - self.kept / self.width

    def units(self, values: Tensor) -> Tensor:
        """The sum of ``values [N, C, *kernel]`` over each unit: ``[ceil(N / height), taps, ceil(C / width)]``.

        For N:M these are the values themselves, ``[N, taps, C]``.
        """
        rows = values.flatten(2).transpose(1, 2) if values.ndim > 2 else values.unsqueeze(1)
        if self.kept is not None:
            return rows
        height, width = self.height, self.width
        rows = F.pad(rows, (0, -rows.shape[2] % width, 0, 0, 0, -rows.shape[0] % height))
        return rows.unflatten(2, (-1, width)).unflatten(0, (-1, height)).sum((1, 4))

    def expand(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """What is said of each unit (as ``units`` returns them) for each weight of a weight of ``shape``."""
        rows = units
        if self.kept is None:
            rows = units.repeat_interleave(self.height, 0).repeat_interleave(self.width, 2)
        return rows[: shape[0], :, : shape[1]].transpose(1, 2).reshape(tuple(shape))

    def lowest(self, scores: Sequence[Tensor], share: float) -> list[Tensor]:
        """True for the units with the lowest scores of all layers together, ``share`` of all units in number.

        ``scores``: one tensor a layer, as ``units`` returns them. Of equals the first goes. With N:M only units that
        are not among the best N of their group can go, and a share of ``most`` takes all of them.
        """
        flat = torch.cat([self._protected(score).flatten() for score in scores])
        removable = int((flat != math.inf).sum())
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen[flat.argsort(stable=True)[: round(min(share / self.most, 1) * removable)]] = True
        parts = chosen.split([score.numel() for score in scores])
        return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]

    def _protected(self, score: Tensor) -> Tensor:
        """Infinity for the best N of each group."""
        if self.kept is None:
            return score
        groups = F.pad(score, (0, -score.shape[2] % self.width), value=-math.inf).unflatten(2, (-1, self.width))
        best = groups.argsort(dim=-1, descending=True, stable=True)[..., : self.kept]
        return groups.scatter(-1, best, math.inf).flatten(2)[..., : score.shape[2]]
