import errno
import os

import pytest

from pumice import files
from pumice.errors import UsageError
from pumice.files import check_destination, move_into_place


def test_a_full_disk_leaves_the_old_file_and_nothing_else(monkeypatch, tmp_path):
    source, path = tmp_path / "source", tmp_path / "model.so"
    source.write_text("new")
    path.write_text("old")

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(UsageError, match="No space left"):
        move_into_place(source, path)
    assert path.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [path, source]


def test_destinations_are_checked_before_anything_is_compiled(tmp_path):
    check_destination(tmp_path / "fine.so")
    assert not list(tmp_path.iterdir())
    for path in (tmp_path, tmp_path / "none" / "model.so"):
        with pytest.raises(UsageError, match=str(path)):
            check_destination(path)


def test_a_device_or_pipe_is_not_replaced(tmp_path):
    source, pipe = tmp_path / "source", tmp_path / "pipe"
    source.write_text("new")
    os.mkfifo(pipe)
    for write in (check_destination, lambda path: move_into_place(source, path)):
        with pytest.raises(UsageError, match="pipe: is a device or a pipe"):
            write(pipe)
    assert pipe.is_fifo()
