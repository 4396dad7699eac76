"""Filters and heads that an advisor takes out before it asks what becomes of each layer that is left."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.ir import IRModule

from pumice.errors import UsageError
from pumice.passes.channel_groups import find_channel_groups
from pumice.passes.prune_spec import Filters, Heads, PruneSpec, parse_prune
from pumice.passes.remove_channels import removable

REMOVALS = ("filters:0.125", "filters:0.25", "filters:0.375", "filters:0.5", "heads:0.25", "heads:0.5")


def ladders(removals: Sequence[str]) -> dict[str, list[PruneSpec]]:
    """By method, from the least amount to the most. Raises UsageError for a specification that removes nothing."""
    found: dict[str, list[PruneSpec]] = {}
    for text in removals:
        spec = parse_prune(text)
        if not isinstance(spec, Filters | Heads) or not spec.amount:
            raise UsageError(f"{text} takes no filters or heads out; give filters:AMOUNT or heads:AMOUNT")
        found.setdefault(spec.method, []).append(spec)
    return {method: sorted(specs, key=amount_of) for method, specs in found.items()}


def amount_of(spec: PruneSpec) -> float:
    """The share of filters or heads, or of zeros; 0 where the specification names none."""
    return float(getattr(spec, "amount", 0.0))


def possible_ladders(mod: IRModule, removals: Sequence[str]) -> dict[str, list[PruneSpec]]:
    """``ladders``, of those that the simplified ``mod`` has channels for.

    Raises UsageError too where ``keep`` or ``only`` name no layer.
    """
    found = {method: [spec for spec in specs if can_remove(mod, spec)] for method, specs in ladders(removals).items()}
    return {method: specs for method, specs in found.items() if specs}


def can_remove(mod: IRModule, spec: PruneSpec) -> bool:
    """Whether the simplified ``mod`` has channels of which such a specification may remove some."""
    is_heads = isinstance(spec, Heads)
    groups = [group for group in find_channel_groups(mod) if (group.kind == "heads") == is_heads]
    return bool(removable(mod, groups, spec, spec.method)[0])
