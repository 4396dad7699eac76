"""``pumice inspect``: what a model, a compiled library or a bundle holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pumice.commands.common import Commands, add_command, add_input_shapes, parse_shapes, terminal_width


def add_parser(commands: Commands) -> None:
    """Declare the sub-command."""
    parser = add_command(
        commands,
        "inspect",
        "show the layers of a model or a compiled library: shapes, zeros, kernels; or what is in a bundle",
        "pumice inspect model.onnx --input image=1x3x224x224",
    )
    parser.add_argument("model", metavar="MODEL|OUT.so|OUT.pum", help="a model, or what it was compiled to")
    add_input_shapes(parser)
    parser.add_argument("--masks", metavar="FILE", help=".safetensors or .npz of 0/1 arrays by weight name")
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(args: argparse.Namespace) -> None:
    """Print the table of a library's manifest, or of a model's layers as they are before compilation.

    Nothing of a library is executed.
    """
    from pumice.loader import Bundle, is_bundle, read_manifest
    from pumice.report_table import format_report, format_variants

    path = Path(args.model)
    if is_bundle(path):
        variants = [variant.to_json() for variant in Bundle(path).variants]
        print(json.dumps({"variants": variants}, indent=2) if args.json else format_variants(variants))
        return
    if _is_library(path):
        description = read_manifest(path)
    else:
        from pumice.driver import inspect_model

        description = inspect_model(args.model, parse_shapes(args.input) or None, args.masks)
    print(json.dumps(description, indent=2) if args.json else format_report(description, terminal_width()))


def _is_library(path: Path) -> bool:
    if path.suffix == ".so":
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"
