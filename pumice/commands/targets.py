"""``pumice targets``: the devices that ``compile --target`` knows by name."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pumice.commands.common import Commands, add_command

_WHOLE = 1000  # columns: these names are there to be copied, so none is cut however narrow the terminal
HEADINGS = ("target", "kernels", "CPU or GPU", "tuned for", "cores", "L1d", "L2", "L3")


def add_parser(commands: Commands) -> None:
    """Declare the sub-command."""
    parser = add_command(
        commands, "targets", "list the devices that `compile --target` knows by name", "pumice targets --json"
    )
    parser.add_argument(
        "--json", action="store_true", help="the same as JSON, with the instruction sets that each needs"
    )


def run(args: argparse.Namespace) -> None:
    """Print the table: levels, boards and servers, GPUs."""
    from pumice.report_table import format_table

    if args.json:
        print(json.dumps([_described(name) for name in ("native", *_names())], indent=2))
        return
    rows = [HEADINGS, *(row(name) for name in _names())]
    print("\n".join(format_table(rows, _WHOLE, {"target", "kernels", "CPU or GPU", "tuned for"})))
    print("\nnative is this machine; a GPU stands beside an x86 or, for sm_87, an ARM CPU, or as in sm_90@armv8-a")


def row(name: str) -> tuple[str, ...]:
    """A line of the table."""
    entry = _described(name)
    cores = str(entry["cores"]) if entry.get("cores") else ""
    caches = [_kib(entry.get(level, 0)) for level in ("l1d", "l2", "l3")]
    if entry.get("l2_is_shared"):
        caches[1] += " shared"
    return name, entry["isa"], entry["title"], entry.get("model", ""), cores, *caches


def _names() -> list[str]:
    from pumice.targets.target import Target

    return [name for name in Target.names() if name != "native"]


def _described(name: str) -> dict[str, Any]:
    from dataclasses import asdict

    from pumice.targets.boards import cpus, gpus
    from pumice.targets.target import Target

    target = Target.parse(name)
    known: Any = cpus().get(name) or gpus().get(name)
    entry = asdict(known) if known else {"name": name, "title": "this machine"}
    found = {"kind": target.kind, "architecture": target.architecture, "isa": target.isa}
    return {**entry, **found, "features": sorted(target.features)}


def _kib(size: int) -> str:
    """KiB as ``512 K`` or ``35.75 M``."""
    if not size:
        return ""
    return f"{size} K" if size < 1024 else f"{size / 1024:.4g} M"
