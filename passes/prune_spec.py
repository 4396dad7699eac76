"""What to prune, as text: the grammar of ``--prune``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pumice.errors import UsageError

BLOCKS = {"unstructured": (1, 1), "1x4": (1, 4), "4x1": (4, 1), "4x4": (4, 4)}  # output x input channels
_FORM = (
    "write magnitude:PATTERN:AMOUNT with PATTERN unstructured, 1x4, 4x1 or 4x4 and AMOUNT from 0 to 1, or "
    "magnitude:N:M with N < M, then any of :global, :norm=l1, :norm=l2, :keep=NAME*,NAME*; "
    "for example magnitude:1x4:0.9:keep=head*"
)


@dataclass(frozen=True)
class PruneSpec:
    """How ``Prune`` chooses what to remove; ``parse`` and ``str`` turn text into it and back.

    Grammar::

        spec    = "magnitude:" what { ":" option }
        what    = pattern ":" amount      amount: the share of blocks that are zero afterwards, 0 to 1
                | N ":" M                 of M neighbouring input channels the N largest stay
        pattern = "unstructured" | "1x4" | "4x1" | "4x4"     output x input channels at one kernel position
        option  = "global"                rank the blocks of all layers together, not layer by layer
                | "norm=l1" | "norm=l2"   what makes a block large: sum of |w| (the default), or of w squared
                | "keep=" glob { "," glob }   layers left alone, by layer or weight name

    Examples: ``magnitude:1x4:0.9``, ``magnitude:unstructured:0.8:global``, ``magnitude:2:4``,
    ``magnitude:4x1:0.5:norm=l2:keep=head*,stem*``.
    """

    pattern: str
    amount: float = 0.0  # unused for N:M, where the pattern says it
    everywhere: bool = False  # one ranking for all layers
    norm: str = "l1"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what ``Prune`` could not carry out."""
        if self.pattern not in BLOCKS and self.group is None:
            raise UsageError(f"pruning pattern {self.pattern!r} is not known; {_FORM}")
        if not 0 <= self.amount <= 1:
            raise UsageError(f"pruning amount {self.amount:g} is not between 0 and 1; {_FORM}")
        if self.norm not in ("l1", "l2"):
            raise UsageError(f"norm {self.norm!r} is not l1 or l2; {_FORM}")
        if self.everywhere and self.group is not None:
            raise UsageError(f"{self.pattern} removes the same share everywhere, so it cannot be global; {_FORM}")

    @property
    def group(self) -> tuple[int, int] | None:
        """N and M of an N:M pattern."""
        match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", self.pattern)
        n, m = (int(match[1]), int(match[2])) if match else (0, 0)
        return (n, m) if 0 < n < m else None

    def keeps(self, *names: str) -> str | None:
        """The first pattern of ``keep`` that one of the names matches."""
        return next((glob for glob in self.keep if any(fnmatchcase(name, glob) for name in names)), None)

    @classmethod
    def parse(cls, text: str) -> PruneSpec:
        """Read the grammar above; raises UsageError, which shows the right form."""
        method, *fields = text.strip().split(":")
        if method != "magnitude" or len(fields) < 2:
            raise UsageError(f"pruning {text!r} is not understood; {_FORM}")
        first, second, *options = fields
        if first in BLOCKS:
            pattern, amount = first, _amount(second, text)
        else:
            pattern, amount = f"{first}:{second}", 0.0
        named: dict[str, str] = {}
        for option in options:
            key, _, value = option.partition("=")
            if key in named or (key, bool(value)) not in (("global", False), ("norm", True), ("keep", True)):
                raise UsageError(f"option {option!r} of pruning {text!r} is not understood; {_FORM}")
            named[key] = value
        keep = tuple(glob for glob in named.get("keep", "").split(",") if glob)
        return cls(pattern, amount, "global" in named, named.get("norm", "l1"), keep)

    def __str__(self) -> str:
        """The text that ``parse`` reads back."""
        parts = ["magnitude", self.pattern]
        if self.group is None:
            parts.append(repr(self.amount))
        if self.everywhere:
            parts.append("global")
        if self.norm != "l1":
            parts.append(f"norm={self.norm}")
        if self.keep:
            parts.append("keep=" + ",".join(self.keep))
        return ":".join(parts)


def _amount(text: str, whole: str) -> float:
    if not re.fullmatch(r"\d*\.?\d+([eE]-?\d+)?|\d+\.", text):
        raise UsageError(f"amount {text!r} of pruning {whole!r} is not a number; {_FORM}")
    return float(text)
