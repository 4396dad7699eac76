"""What to prune and how, as data and as text: the grammar of ``--prune`` and of recipes.

    spec     = method { ":" field } { ":" option }
    magnitude:PATTERN:AMOUNT     the smallest weights go
    wanda:PATTERN:AMOUNT         the smallest weights times the size of their inputs
    sparsegpt:PATTERN:AMOUNT     those whose loss the other weights make up for best, and they do
    obc:PATTERN:AMOUNT           the same, chosen one after the other: better and slower
    near-zero:PATTERN:THRESHOLD  all that is no larger than the threshold
    filters:AMOUNT               output channels are taken out of the network
    heads:AMOUNT                 attention heads are taken out of the network

PATTERN is ``unstructured``, a block of output x input channels (``1x4``, ``4x1``, ``2x4``, ``4x4``, ``16x4``), or N:M,
which says its AMOUNT itself. AMOUNT, from 0 to 1, is the share of units that are zero (or gone) afterwards.
Every spec takes ``keep=GLOB,GLOB`` (layers left alone) and ``only=GLOB,GLOB`` (no layer but these), by layer or weight
name. The other options are the fields of the classes below: one that is a choice or a flag is named by itself
(``erk``, ``relative``), another as ``name=value`` (``norm=l2``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from pumice.errors import UsageError
from pumice.patterns import KNOWN, Pattern

ALLOCATIONS = ("uniform", "global", "erk", "sensitivity")
EXAMPLES = "magnitude:1x4:0.9:keep=head*, sparsegpt:2:4, near-zero:unstructured:1e-3, filters:0.3"


@dataclass(frozen=True)
class PruneSpec:
    """What every method has: which layers. ``str`` gives the text that ``parse_prune`` reads back."""

    method: ClassVar[str] = ""
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}  # fields whose value stands alone as an option, by name

    keep: tuple[str, ...] = field(default=(), kw_only=True)  # layers left alone
    only: tuple[str, ...] = field(default=(), kw_only=True)  # no layer but these; all if empty

    def keeps(self, *names: str) -> str | None:
        """The pattern by which a layer with these names is left alone; None where it is pruned."""
        if self.only and not any(_matches(glob, names) for glob in self.only):
            return f"only={','.join(self.only)}"
        glob = next((glob for glob in self.keep if _matches(glob, names)), None)
        return None if glob is None else f"keep={glob}"

    def __str__(self) -> str:
        parts = [self.method]
        for each in sorted(fields(self), key=lambda each: each.name in _EVERY):
            value = getattr(self, each.name)
            if each.name in _POSITIONAL:
                skipped = each.name == "amount" and getattr(self, "pattern", Pattern()).amount is not None
                parts += [] if skipped else [_text(value)]
            elif value != each.default:
                parts.append(self._option(each.name, value))
        return ":".join(parts)

    def _option(self, name: str, value: Any) -> str:
        if name in self.choices:
            return str(value)
        if value is True:
            return name
        return f"{name}={','.join(value) if isinstance(value, tuple) else _text(value)}"


@dataclass(frozen=True)
class _PatternSpec(PruneSpec):
    """A share of the units of a pattern.

    ``allocation`` says how the share is spread over the layers: ``uniform``; ``global``, one ranking of all units;
    ``erk``, fewer zeros where a layer is narrow (Erdos-Renyi-kernel, Evci et al., arXiv:1911.11134); ``sensitivity``,
    fewer where the layer's output suffers more, by calibration data. N:M is uniform.
    """

    choices: ClassVar[dict[str, tuple[str, ...]]] = {"allocation": ALLOCATIONS}

    pattern: Pattern
    amount: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what could not be carried out; N:M gives the amount."""
        if self.pattern.amount is not None:
            object.__setattr__(self, "amount", self.pattern.amount)
            if getattr(self, "allocation", "uniform") != "uniform":
                raise UsageError(f"{self.pattern} removes the same share everywhere, so it cannot be spread otherwise")
        _check_share("pruning amount", self.amount)


@dataclass(frozen=True)
class Magnitude(_PatternSpec):
    """The units with the smallest weights go (Han et al., arXiv:1506.02626).

    ``norm`` is what makes a unit small: ``l1``, the sum of |w|, or ``l2``, of w squared.
    """

    method: ClassVar[str] = "magnitude"

    allocation: str = "uniform"
    norm: str = "l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice(self.norm, ("l1", "l2"), "norm")


@dataclass(frozen=True)
class NearZero(PruneSpec):
    """Every unit goes whose largest weight is no larger than ``threshold``.

    ``relative`` takes the threshold times the root mean square of the layer's weights in place of a plain number.
    """

    method: ClassVar[str] = "near-zero"

    pattern: Pattern
    threshold: float = 0.0
    relative: bool = False

    def __post_init__(self) -> None:
        if self.pattern.group is not None:
            raise UsageError(f"a threshold decides how much goes, and {self.pattern} does too: give blocks")
        if not 0 <= self.threshold < float("inf"):
            raise UsageError(f"the threshold {self.threshold:g} is not a size that weights can have")


@dataclass(frozen=True)
class Wanda(_PatternSpec):
    """The units with the smallest |w| times the norm of their inputs go, row by row (Sun et al., arXiv:2306.11695).

    Row by row as in the paper where a unit lies in one row; blocks of several rows, and other allocations than
    ``uniform``, rank the whole layer.
    """

    method: ClassVar[str] = "wanda"

    allocation: str = "uniform"


@dataclass(frozen=True)
class Surgeon(_PatternSpec):
    """The units whose loss the others make up for best go, and they do.

    ``damping`` is what is added to the diagonal of the inputs' second moments, as a share of its mean.
    """

    allocation: str = "uniform"
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping < float("inf"):
            raise UsageError(f"damping={self.damping:g} of {self.method} is not above 0")


@dataclass(frozen=True)
class SparseGPT(Surgeon):
    """In one pass over the columns of the weight (Frantar and Alistarh, arXiv:2301.00774).

    ``refits`` counts the rounds that choose again with the weights refitted, and end in the least squares solution for
    the zeros chosen; 0 is the one pass of the paper.
    """

    method: ClassVar[str] = "sparsegpt"

    refits: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.refits <= 100:
            raise UsageError(f"refits={self.refits} of sparsegpt is not between 0 and 100")


@dataclass(frozen=True)
class OBC(Surgeon):
    """One after the other, each the one that loses least by then (Optimal Brain Compression, arXiv:2208.11580).

    What is left ends in the least squares solution. The time grows with the third power of a layer's inputs.
    """

    method: ClassVar[str] = "obc"


@dataclass(frozen=True)
class Filters(PruneSpec):
    """Output channels are taken out, with all that only they feed.

    ``by`` ranks them: ``l1`` or ``l2`` norm of the filter (arXiv:1608.08710), ``norm-scale``, batch norm's
    (arXiv:1708.06519), or ``activation`` over calibration data. ``everywhere`` ranks all groups of channels
    together. What is left of a group is a multiple of ``multiple``.
    """

    method: ClassVar[str] = "filters"

    amount: float
    by: str = "l1"
    everywhere: bool = False
    multiple: int = 4

    def __post_init__(self) -> None:
        _check_share("share of filters", self.amount)
        _check_choice(self.by, ("l1", "l2", "norm-scale", "activation"), "by")
        if self.multiple < 1:
            raise UsageError(f"multiple={self.multiple} of filters is not at least 1")


@dataclass(frozen=True)
class Heads(PruneSpec):
    """Attention heads are taken out (Michel et al., arXiv:1905.10650): of each layer that share, at least one stays."""

    method: ClassVar[str] = "heads"

    amount: float

    def __post_init__(self) -> None:
        _check_share("share of heads", self.amount)


METHODS: dict[str, type[PruneSpec]] = {
    spec.method: spec for spec in (Magnitude, Wanda, SparseGPT, OBC, NearZero, Filters, Heads)
}
_EVERY = ("keep", "only")
_POSITIONAL = ("pattern", "amount", "threshold")
_NUMBER = re.compile(r"\d*\.?\d+([eE]-?\d+)?|\d+\.")


def parse_prune(text: str) -> PruneSpec:
    """Read the grammar above; raises UsageError, which shows examples of the right form."""
    method, *parts = text.strip().split(":")
    if method not in METHODS:
        raise UsageError(f"pruning {text!r} is not understood: the methods are {', '.join(METHODS)}; {_form()}")
    kind = METHODS[method]
    known = {each.name for each in fields(kind)}
    values: dict[str, Any] = {}
    if "pattern" in known:
        values["pattern"], parts = _pattern(parts, text)
    size = "threshold" if "threshold" in known else "amount"
    if values.get("pattern", Pattern()).amount is None:
        if not parts or not _NUMBER.fullmatch(parts[0]):
            raise UsageError(f"pruning {text!r} has no {size}, a number, where it should be; {_form()}")
        values[size] = float(parts.pop(0))
    for option in parts:
        name, value = _read_option(kind, option, text)
        if name in values:
            raise UsageError(f"option {option!r} of pruning {text!r} says {name} a second time; {_form()}")
        values[name] = value
    return kind(**values)


def check_globs(spec: PruneSpec, layers: Sequence[tuple[str, ...]], source: str) -> None:
    """Raise UsageError where ``keep`` or ``only`` names none of the ``layers`` (their names): it would be a slip."""
    for option in ("keep", "only"):
        for glob in getattr(spec, option):
            if not any(_matches(glob, names) for names in layers):
                known = ", ".join(names[0] for names in layers[:8])
                raise UsageError(f"{option}={glob} names no layer of {source}; its layers are {known}, ...")


def _pattern(parts: list[str], text: str) -> tuple[Pattern, list[str]]:
    """The pattern in front, which is one part or, as in 2:4, two."""
    if parts and parts[0].isdecimal() and len(parts) > 1:
        return Pattern.parse(":".join(parts[:2])), parts[2:]
    if not parts or not (parts[0] == "unstructured" or "x" in parts[0]):
        raise UsageError(f"pruning {text!r} has no pattern where it should be: {KNOWN}; {_form()}")
    return Pattern.parse(parts[0]), parts[1:]


def _read_option(kind: type[PruneSpec], option: str, text: str) -> tuple[str, Any]:
    name, equals, value = option.partition("=")
    for field_name, choices in kind.choices.items():
        if option in choices:
            return field_name, option
    types = {each.name: each.type for each in fields(kind) if each.name not in (*_POSITIONAL, *kind.choices)}
    wanted = types.get(name)
    if wanted == "bool" and not equals:
        return name, True
    if wanted == "str" and value:
        return name, value
    if wanted == "int" and value.isdecimal():
        return name, int(value)
    if wanted == "float" and _NUMBER.fullmatch(value):
        return name, float(value)
    globs = tuple(glob for glob in value.split(",") if glob)
    if str(wanted).startswith("tuple") and globs:
        return name, globs
    raise UsageError(f"option {option!r} of pruning {text!r} is not understood; {_form()}")


def _matches(glob: str, names: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, glob) for name in names)


def _check_share(what: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UsageError(f"{what} {value:g} is not between 0 and 1; {_form()}")


def _check_choice(value: str, known: tuple[str, ...], what: str) -> None:
    if value not in known:
        raise UsageError(f"{what} {value!r} is not {' or '.join(known)}; {_form()}")


def _form() -> str:
    return f"for example {EXAMPLES}"


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)
