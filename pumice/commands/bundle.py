"""``pumice bundle``: libraries of one model for several machines in one file."""

from __future__ import annotations

import argparse
import json

from pumice.commands.common import Commands, add_command, refuse_to_overwrite


def add_parser(commands: Commands) -> None:
    """Declare the sub-command."""
    parser = add_command(
        commands,
        "bundle",
        "put libraries of one model for several machines into one archive, from which each takes the best it can run",
        "pumice bundle model-v3.so model-v4.so model-arm.so -o model.pum",
    )
    parser.add_argument("libraries", nargs="+", metavar="OUT.so", help="what `pumice compile --target ...` wrote")
    parser.add_argument("-o", "--output", required=True, metavar="OUT.pum", help="the archive to write")
    parser.add_argument("--json", action="store_true", help="what is in it as JSON")


def run(args: argparse.Namespace) -> None:
    """Write it, and say what sharing saved."""
    from pumice.bundle import write_bundle
    from pumice.files import check_destination
    from pumice.report_table import clean, format_bytes, format_variants

    check_destination(args.output)
    refuse_to_overwrite(args.output, *args.libraries)
    written = write_bundle(args.libraries, args.output)
    if args.json:
        variants = [{key: entry[key] for key in ("name", "target", "bytes", "sha256")} for entry in written.variants]
        print(json.dumps({"file": args.output, "bytes": written.size, "variants": variants}, indent=2))
        return
    print(format_variants(written.variants))
    sizes = f"{format_bytes(written.size)}, where they have {format_bytes(written.size_alone)} by themselves"
    print(f"bundle: {clean(args.output)}, {sizes}")
