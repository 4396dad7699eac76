import errno
import os
import shutil
import subprocess

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.script import ir as I
from tvm.script import relax as R

from pumice.errors import MissingDependencyError, ModelError, UsageError
from pumice.passes.link_steps import link_steps
from pumice.targets import library
from pumice.targets.executor import load_library
from pumice.targets.library import check_destination, find_compiler, move_into_place, write_library
from pumice.targets.manifest import SECTION, read_manifest
from pumice.targets.target import Target

MANIFEST = {"target": {"name": "x86-64"}, "inputs": [], "outputs": [], "layers": [], "versions": {}, "note": "ä\n\x1b"}


@I.ir_module
class Doubling:
    @R.function
    def main(x: R.Tensor((4,), "float32")):
        y = R.add(x, x)
        return y


PLAN = link_steps(tvm.relax.transform.LegalizeOps()(Doubling))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    path = tmp_path_factory.mktemp("library") / "double.so"
    write_library(PLAN, Target.parse("x86-64"), MANIFEST, path)
    return path


def test_the_library_runs_and_its_manifest_comes_back(built):
    executor = load_library(built, PLAN.workspace, PLAN.inputs, PLAN.outputs)
    executor.inputs[0][:] = np.arange(4)
    executor.run()
    np.testing.assert_array_equal(executor.outputs[0], [0, 2, 4, 6])
    steps = [{"kernel": "add", "layer": ""}]
    assert read_manifest(built) == {"format": 2, "steps": steps, "weights": 0, "workspace": 0, **MANIFEST}


def test_the_same_module_gives_the_same_bytes(built, tmp_path):
    write_library(PLAN, Target.parse("x86-64"), MANIFEST, tmp_path / "again.so")
    assert (tmp_path / "again.so").read_bytes() == built.read_bytes()


@pytest.mark.skipif(not shutil.which("strip"), reason="binutils is not installed")
def test_strip_leaves_the_manifest(built, tmp_path):
    copy = shutil.copy(built, tmp_path)
    subprocess.run(["strip", copy], check=True)
    assert read_manifest(copy)["note"] == MANIFEST["note"]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_library_cut_off_anywhere_is_refused_or_whole(built, tmp_path_factory, data):
    content = built.read_bytes()
    path = tmp_path_factory.mktemp("cut") / "cut.so"
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ModelError) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_damaged_headers_are_refused_or_harmless(built, tmp_path_factory, data):
    content = bytearray(built.read_bytes())
    table = int.from_bytes(content[40:48], "little")
    places = st.one_of(st.integers(0, 63), st.integers(table, len(content) - 1))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(places)] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "damaged.so"
    path.write_bytes(content)
    try:
        read_manifest(path)
    except ModelError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"<html>404</html>", bytes(100), b"\x7fELF" + bytes(60)])
def test_what_is_no_library_is_refused(tmp_path, content):
    path = tmp_path / "bad.so"
    path.write_bytes(content)
    with pytest.raises(ModelError):
        read_manifest(path)


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.so"):
        with pytest.raises(ModelError, match="cannot be read"):
            read_manifest(path)


def test_a_library_of_somebody_else_is_refused():
    import _ctypes

    if _ctypes.__file__.endswith(".so"):
        with pytest.raises(ModelError, match=SECTION):
            read_manifest(_ctypes.__file__)


def test_a_manifest_of_a_newer_format_or_without_its_parts_is_refused(built, tmp_path):
    for old, new, says in ((b'"format":2', b'"format":3', "format 3"), (b'"layers"', b'"lawyer"', "damaged")):
        path = tmp_path / "other.so"
        path.write_bytes(built.read_bytes().replace(old, new))
        with pytest.raises(ModelError, match=says):
            read_manifest(path)


def test_without_a_compiler_the_message_says_how_to_install_one(monkeypatch):
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    for target in ("x86-64", "armv8-a"):
        with pytest.raises(MissingDependencyError, match="apt-get install gcc"):
            find_compiler(Target.parse(target))


def test_zig_links_where_there_is_nothing_else(monkeypatch):
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: object())
    assert find_compiler(Target.parse("armv8-a"))[-1] == "aarch64-linux-gnu"


@pytest.mark.parametrize("compiler", ["false", "true"])
def test_a_compiler_that_fails_leaves_the_old_library(monkeypatch, tmp_path, compiler):
    path = tmp_path / "model.so"
    path.write_text("old")
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(MissingDependencyError, match=compiler):
        write_library(PLAN, Target.parse("x86-64"), MANIFEST, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(monkeypatch, tmp_path):
    source, path = tmp_path / "source", tmp_path / "model.so"
    source.write_text("new")
    path.write_text("old")

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(library.os, "fsync", fail)
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
