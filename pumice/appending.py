"""Files of lines that one process at a time adds to, and that outlive a process which was killed while it wrote."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pumice.errors import UsageError

Content = TypeVar("Content")
Append = Callable[[Sequence[str]], None]


@contextmanager
def open_to_append(path: Path, read: Callable[[Path], Content], writer: str) -> Iterator[tuple[Content, Append]]:
    """What ``read`` makes of the file, and what adds lines to it; the file is made if it is not there.

    ``read`` is told of the file before anything in it changes, so what it refuses stays as it is. A last line without
    its end, which a killed process left, is then cut off. Lines added together are written in one go.

    Raises UsageError: a file that cannot be written, or that another process (``writer``, in words) adds to; and what
    ``read`` raises.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error

    def append(lines: Sequence[str]) -> None:
        os.write(descriptor, "".join(line + "\n" for line in lines).encode())

    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"{path}: another {writer} is writing to it; give each a file of its own") from error
        content = read(path)
        os.ftruncate(descriptor, path.read_bytes().rfind(b"\n") + 1)
        yield content, append
    finally:
        os.close(descriptor)
