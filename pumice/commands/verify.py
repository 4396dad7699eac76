"""``pumice verify``: whether a library computes on this machine what it computed when it was compiled."""

from __future__ import annotations

import argparse
import json

from pumice.commands.common import Commands, add_command


def add_parser(commands: Commands) -> None:
    """Declare the sub-command."""
    parser = add_command(
        commands,
        "verify",
        "compare the numbers of every layer of a compiled library with those of its compilation",
        "pumice verify model.so",
    )
    parser.add_argument("library", metavar="OUT.so|OUT.pum", help="a library, or a bundle that one is chosen from")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one for each core")
    parser.add_argument("--json", action="store_true", help="the result as JSON, where it is right")


def run(args: argparse.Namespace) -> None:
    """Run the stored input; say that everything is right. A layer that differs is an error, with exit code 6."""
    from pumice.artifact import load
    from pumice.report_table import clean

    model = load(args.library, args.threads)
    model.verify()
    steps, exact = len(model.manifest["steps"]), model.manifest["check"]["exact"]
    if args.json:
        print(json.dumps({"library": args.library, "steps": steps, "exact": exact, "threads": model.threads}))
        return
    rest = "" if exact == steps else f", and so do its outputs, within a tolerance, after the {steps - exact} others"
    print(f"{clean(args.library)}: {exact} of {steps} kernels give here, bit for bit, what they gave there{rest}")
