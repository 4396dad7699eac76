"""A recipe: all that a user decides about the accuracy and size of a network, as data and as a TOML file.

    prune = ["sparsegpt:1x4:0.5:refits=30:only=encoder.layer.0.*", "sparsegpt:1x4:0.7:keep=encoder.layer.0.*"]
    permute = true
    rounding = "gptq"
    keep_float = ["classifier"]

The keys are the fields of ``Recipe``; one that is not there has its default.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pumice.errors import ModelError, UsageError
from pumice.passes.observers import OBSERVERS
from pumice.passes.prune_spec import Filters, Heads, PruneSpec, parse_prune

ROUNDINGS = ("nearest", "gptq")


@dataclass(frozen=True)
class Recipe:
    """What becomes of the numbers, in the order in which it is done; see the passes of these names."""

    prune: tuple[PruneSpec, ...] = ()  # one after the other
    permute: bool = False  # order channels so that what is pruned lies together
    reconstruct: int = 0  # steps of training each block towards what the dense one gives on calibration data
    reconstruct_whole: bool = False  # and then as many of the network as a whole
    quantize: bool = True
    keep_float: tuple[str, ...] = ()  # name patterns of layers that stay float32
    float_budget: float = 0.0  # share of the multiply-adds that may stay float32, where int8 does the most harm
    smooth: float | str = 0.0  # SmoothQuant's strength, 0 to 1, or "search", one for each tensor; 0: none
    equalize: bool = True
    calibration_method: str = "minmax"
    rounding: str = "nearest"
    correct_bias: bool = True

    def __post_init__(self) -> None:
        """Refuse what no pass could carry out."""
        if self.calibration_method not in OBSERVERS:
            raise UsageError(f"no calibration method {self.calibration_method!r}; there are {', '.join(OBSERVERS)}")
        if self.rounding not in ROUNDINGS:
            raise UsageError(f"no rounding {self.rounding!r}; there are {', '.join(ROUNDINGS)}")
        for name, most in (("smooth", 1.0), ("float_budget", 1.0), ("reconstruct", 1e9)):
            if name == "smooth" and self.smooth == "search":
                continue
            value = getattr(self, name)
            if isinstance(value, str) or not 0 <= value <= most:
                raise UsageError(f"{name} {value} is not between 0 and {most:g}")

    @property
    def removals(self) -> tuple[PruneSpec, ...]:
        """Those of ``prune`` that take filters or heads out of the network; they come first."""
        return tuple(spec for spec in self.prune if isinstance(spec, Filters | Heads))

    @property
    def zeroing(self) -> tuple[PruneSpec, ...]:
        """The others of ``prune``, which make weights zero."""
        return tuple(spec for spec in self.prune if not isinstance(spec, Filters | Heads))

    def but(self, **changes: Any) -> Recipe:
        """The recipe with the ``changes`` that are not None; ``prune`` may be text, a spec, or several."""
        given = {name: value for name, value in changes.items() if value is not None}
        if "prune" in given:
            given["prune"] = _specs(given["prune"])
        if "keep_float" in given:
            globs = given["keep_float"]
            given["keep_float"] = (globs,) if isinstance(globs, str) else tuple(globs)
        return replace(self, **given)

    def pruning(self, specs: Sequence[PruneSpec]) -> Recipe:
        """The recipe with these specifications; where they make nothing zero there is nothing to reconstruct."""
        pruned = replace(self, prune=tuple(specs))
        return pruned if pruned.zeroing else replace(pruned, reconstruct=0, reconstruct_whole=False)

    def to_json(self) -> dict[str, Any]:
        """A plain dict that ``from_json`` reads back."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**values, "prune": [str(spec) for spec in self.prune], "keep_float": list(self.keep_float)}

    @classmethod
    def from_json(cls, data: dict[str, Any], source: str = "the recipe") -> Recipe:
        """Read what ``to_json`` gives; raises ModelError with the key that is unknown or of the wrong type."""
        kinds = {each.name: type(getattr(cls(), each.name)) for each in fields(cls)}
        for key, value in data.items():
            if key not in kinds:
                raise ModelError(f"{source}: no recipe has {key!r}; the keys are {', '.join(kinds)}")
            if not _fits(value, kinds[key]):
                wanted = "a list of texts" if kinds[key] is tuple else f"a {kinds[key].__name__}"
                raise ModelError(f"{source}: {key} is {json.dumps(value, default=str)}, and should be {wanted}")
        try:
            return cls().but(**data)
        except UsageError as error:
            raise ModelError(f"{source}: {error}") from error


def recipe_of(given: Recipe | str | Path | None) -> Recipe:
    """The recipe that is given, or that is in the file; without any, the default. Raises what ``read_recipe`` does."""
    return read_recipe(given) if isinstance(given, str | Path) else given or Recipe()


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a TOML file; raises ModelError, with the file's name and the place, for what is none."""
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not a recipe, which is a TOML file: {error}") from error
    return Recipe.from_json(data, str(path))


def format_recipe(recipe: Recipe, comment: str = "") -> str:
    """The recipe as TOML, without what is as always; each line of ``comment`` goes on top."""
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    for key, value in recipe.to_json().items():
        if value == Recipe().to_json()[key]:
            continue
        if isinstance(value, list):
            lines += [f"{key} = [", *(f"    {_toml(item)}," for item in value), "]"]
        else:
            lines.append(f"{key} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _specs(given: str | PruneSpec | Sequence[str | PruneSpec]) -> tuple[PruneSpec, ...]:
    several = [given] if isinstance(given, str | PruneSpec) else given
    return tuple(parse_prune(spec) if isinstance(spec, str) else spec for spec in several)


def _fits(value: Any, kind: type) -> bool:
    if kind is tuple:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind is float:
        return value == "search" or (isinstance(value, int | float) and not isinstance(value, bool))
    return type(value) is kind


def _toml(value: Any) -> str:
    """JSON's text of strings, numbers and booleans is TOML's, but for one character that TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
