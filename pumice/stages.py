"""The stages of a compilation: what is being done, and how long it took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# A stage begins (None), has ended after so many seconds, or has failed (NaN).
Progress = Callable[[str, float | None], None]


class Stages:
    """Times each stage and tells ``progress``."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress or (lambda name, seconds: None)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """One stage, for the length of a ``with``."""
        self._progress(name, None)
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            self._progress(name, math.nan)
            raise
        self._progress(name, time.perf_counter() - start)
