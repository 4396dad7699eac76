"""``pumice demo``: everything on the embedded networks and real images."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pumice.commands.common import Commands, add_command, positive, show_progress
from pumice.errors import MissingDependencyError, UsageError

if TYPE_CHECKING:
    from pumice.demo.run import Entry


def add_parser(commands: Commands) -> None:
    """Declare the sub-command."""
    parser = add_command(
        commands,
        "demo",
        "compile the embedded Fashion-MNIST networks and run 2,000 images, beside ONNX Runtime",
        "pumice demo --out out/demo",
    )
    parser.add_argument("--out", default="out/demo", metavar="FOLDER", help="for plot and table (default: out/demo)")
    parser.add_argument("--data", metavar="FOLDER", help="of fashion.zip and fashion.npz (default: the embedded ones)")
    parser.add_argument("--target", default="native", metavar="NAME", help="what Pumice compiles for")
    parser.add_argument("--threads", type=int, metavar="N", help="for every engine (default: one for each core)")
    parser.add_argument("--seconds", type=positive, default=8.0, metavar="S", help="of timing in all (default: 8)")
    parser.add_argument("--json", action="store_true", help="the table as JSON")


def run(args: argparse.Namespace) -> None:
    """Run it, print the table, write table and plot."""
    import pumice.demo
    from pumice.demo.plot import plot
    from pumice.demo.run import read_data, run_demo

    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: cannot be made a folder: {error.strerror}") from error
    folder = Path(args.data) if args.data else Path(pumice.demo.__file__).parent
    with tempfile.TemporaryDirectory(prefix="pumice-") as scratch:
        data = read_data(folder, Path(scratch))
        entries, notes = run_demo(data, Path(scratch), args.target, args.threads, args.seconds, show_progress)
    written = [out / "demo.json"]
    table = {"images": len(data.test_images), "engines": [entry.to_json() for entry in entries], "notes": notes}
    written[0].write_text(json.dumps(table, indent=2) + "\n")
    try:
        plot(entries, out / "demo.png")
        written.append(out / "demo.png")
    except MissingDependencyError as error:
        notes.append(str(error))
    if args.json:
        print(json.dumps(table, indent=2))
        return
    print(f"\nFashion-MNIST, {len(data.test_images)} test images\n")
    print(format_entries(entries))
    print("\n".join(["", *(f"note: {note}" for note in notes), *(f"written: {path}" for path in written)]))


def format_entries(entries: Sequence[Entry]) -> str:
    """The table, for a person."""
    from pumice.report_table import format_bytes, format_table

    rows: list[tuple[str, ...]] = [
        ("engine", "right %", "as float %", "median ms", "p10 ms", "p90 ms", "file bytes", "weight bytes")
    ]
    for e in entries:
        times = (f"{t:.3f}" for t in (e.milliseconds, e.p10, e.p90))
        weights = format_bytes(e.weight_bytes) if e.weight_bytes else ""
        rows.append((e.name, f"{e.accuracy:.2f}", f"{e.agreement:.2f}", *times, format_bytes(e.file_bytes), weights))
    return "\n".join(format_table(rows, 120, {"engine"}))
