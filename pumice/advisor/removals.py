"""Filters and heads that an advisor takes out before it asks what becomes of each layer that is left."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.ir import IRModule

from pumice.errors import UsageError
from pumice.passes.channel_groups import ChannelGroup, find_channel_groups
from pumice.passes.prune_spec import Filters, Heads, PruneSpec, parse_prune
from pumice.passes.remove_channels import removable

REMOVALS = ("filters:0.125", "filters:0.25", "filters:0.375", "filters:0.5", "heads:0.25", "heads:0.5")


def ladders(removals: Sequence[str]) -> dict[str, list[Filters | Heads]]:
    """By method, from the least amount to the most. Raises UsageError for a specification that removes nothing."""
    found: dict[str, list[Filters | Heads]] = {}
    for text in removals:
        spec = parse_prune(text)
        if not isinstance(spec, Filters | Heads) or not spec.amount:
            raise UsageError(f"{text} takes no filters or heads out; give filters:AMOUNT or heads:AMOUNT")
        found.setdefault(spec.method, []).append(spec)
    return {method: sorted(specs, key=lambda spec: spec.amount) for method, specs in found.items()}


def possible_ladders(mod: IRModule, removals: Sequence[str]) -> dict[str, list[Filters | Heads]]:
    """``ladders``, of those that the simplified ``mod`` has channels for.

    Raises UsageError too where ``keep`` or ``only`` name no layer.
    """
    groups = find_channel_groups(mod)
    found = {
        method: [spec for spec in specs if _can_remove(mod, groups, spec)]
        for method, specs in ladders(removals).items()
    }
    return {method: specs for method, specs in found.items() if specs}


def _can_remove(mod: IRModule, groups: Sequence[ChannelGroup], spec: PruneSpec) -> bool:
    is_heads = isinstance(spec, Heads)
    return bool(removable(mod, [group for group in groups if (group.kind == "heads") == is_heads], spec, "")[0])
