"""What a long run has found out so far, in a file of JSON lines: killed, it goes on from there.

    {"key": "5f0c...", "what": "options of conv2", "value": [...]}

A key is a hash of the run (model, data, options) and of what was asked, so one file may serve several runs, and what
belongs to another is not found. A line is written in one go; one without its end, which a killed process left, is cut
off by the next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pumice.appending import Append, open_to_append
from pumice.errors import UsageError

Json = TypeVar("Json")


class WorkFile:
    """Remembers JSON values by what they answer; without a file, for as long as it lives."""

    def __init__(self, run: str, known: dict[str, Any] | None = None, append: Append | None = None) -> None:
        """``run`` is what all values depend on, as text."""
        self._run = run
        self._known = known or {}
        self._append = append

    def has(self, what: str, *details: str) -> bool:
        """Whether the answer is known."""
        return self._key(what, details) in self._known

    def remember(self, compute: Callable[[], Json], what: str, *details: str) -> Json:
        """The value for ``what`` and its ``details``: as it was found before, else computed and written down."""
        key = self._key(what, details)
        if key not in self._known:
            value = compute()
            self._known[key] = value
            if self._append is not None:
                self._append([json.dumps({"key": key, "what": what, "value": value})])
        found: Json = self._known[key]
        return found

    def _key(self, what: str, details: tuple[str, ...]) -> str:
        return hashlib.sha256(json.dumps([self._run, what, *details]).encode()).hexdigest()[:32]


@contextmanager
def open_work_file(path: str | Path | None, run: str) -> Iterator[WorkFile]:
    """The work file at ``path``, made if it is not there; None for one in memory only.

    Raises UsageError: a file that is none, that cannot be written, or that another process adds to.
    """
    if path is None:
        yield WorkFile(run)
        return
    with open_to_append(Path(path), _read, "process") as (known, append):
        yield WorkFile(run, known, append)


def _read(path: Path) -> dict[str, Any]:
    *lines, rest = path.read_bytes().split(b"\n")
    known = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            known[str(entry["key"])] = entry["value"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(
                f"{path}, line {number}: is no line of a work file; delete the file to start anew, or name another"
            ) from error
    if not lines and rest and not rest.startswith(b'{"key'):
        raise UsageError(f"{path}: is no work file; name another")
    return known
