"""Each measurement in a process of its own: memory is given back, and no engine's threads outlive their turn."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.environment import environment

Call = Callable[..., Any]


@contextmanager
def fresh_processes() -> Iterator[Call]:
    """``call(function, *arguments)`` runs ``function`` in a new process and gives what it returns."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def write_runs(path: Path, benchmark: str, runs: list[dict[str, Any]]) -> None:
    """A benchmark's JSON: what was measured where. To be called after each run, for they take long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"benchmark": benchmark, "environment": environment(), "runs": runs}
    path.write_text(json.dumps(report, indent=1) + "\n")
