"""The options that the benchmarks of speed share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pumice.peers import PEERS


def speed_options(
    description: str | None, zeros: Sequence[float], threads: Sequence[int], seconds: float, json: str
) -> argparse.ArgumentParser:
    """A parser with shares of zero blocks, thread counts, peers, target, time and output, and these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zeros", nargs="+", type=float, default=list(zeros), help="shares of 1x4 blocks")
    parser.add_argument("--threads", nargs="+", type=int, default=list(threads))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--target", default="native", help="what Pumice compiles for")
    parser.add_argument("--seconds", type=float, default=seconds, help="how long those of one run take turns in all")
    parser.add_argument("--json", type=Path, default=Path(json))
    return parser
