"""How to train in the zeros of a recipe, as lines of Python for ``pumice.frontend.torch``."""

from __future__ import annotations

from pumice.patterns import Pattern
from pumice.recipe import Recipe

_STEPS = 5000


def training_lines(recipe: Recipe, steps: int = _STEPS) -> tuple[str, ...]:
    """A pruner for each specification of the recipe, its amount reached after ``steps``; none where it prunes nothing.

    Layers have the names of the model's file, which are those of the PyTorch module it came from, where it did.
    """
    lines = []
    for spec in recipe.prune:
        pattern, amount = getattr(spec, "pattern", None), float(getattr(spec, "amount", 0.0))
        if not isinstance(pattern, Pattern) or amount == 0:
            continue
        only = "" if not spec.only else f", only={list(spec.only)}"
        schedule = f"CubicSchedule(start=0, end={steps}, initial=0.0, final={amount!r}, every={max(1, steps // 100)})"
        lines.append(f'GradualPruner(model, {schedule}, pattern="{pattern}"{only})')
    return tuple(lines)
