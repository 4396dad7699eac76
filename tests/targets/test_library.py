import ctypes
import hashlib
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tvm
from elf import Elf
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.script import ir as I
from tvm.script import relax as R

from pumice import loader
from pumice.errors import MissingDependencyError, ModelError
from pumice.passes.link_steps import link_steps
from pumice.schedules.copy import copy
from pumice.targets.executor import link_model, plain_manifest
from pumice.targets.library import write_library
from pumice.targets.manifest import FORMAT, SECTION, read_manifest
from pumice.targets.plan import FIRST_INPUT, WEIGHTS, Plan, Step, View
from pumice.targets.target import Target

MANIFEST = {
    "target": {"name": "x86-64", "architecture": "x86_64", "features": []},
    "inputs": [{"name": "x", "shape": [4], "dtype": "float32"}],
    "outputs": [{"name": "y", "shape": [4], "dtype": "float32"}],
    "layers": [],
    "versions": {},
    "note": "ä\n\x1b",
}


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
    with loader.load(built) as model:
        np.testing.assert_array_equal(model(np.arange(4, dtype=np.float32))["y"], [0, 2, 4, 6])
    steps = [{"kernel": "add", "layer": "", "outputs": [16]}]
    planned = {"steps": steps, "weights": 0, "workspace": 0, "scratch": 0, "check": None}
    hashes = {"weights_sha256": hashlib.sha256().hexdigest()}
    assert read_manifest(built) == {"format": FORMAT, **planned, **hashes, **MANIFEST}


def test_it_needs_no_more_than_libc_and_shows_no_more_than_the_interface(built):
    elf = Elf.read(built)
    assert {name.partition(".")[0] for name in elf.needed} <= {"libc", "libm", "libpthread"}
    assert all(name.startswith("pumice_") for name in elf.exported) and "pumice_steps" not in elf.exported
    assert not {name for name in elf.undefined if name.startswith(("TVM", "__tvm", "__tls", "_ITM", "__gmon"))}


def test_weights_are_mapped_on_a_page_and_read_only(tmp_path):
    weights = np.arange(5000).astype(np.uint8)
    steps = (Step("copy", (View(WEIGHTS), View(FIRST_INPUT)), outputs=(100,)),)
    plan = Plan({"copy": copy(100)}, steps, weights, 0, (), (((100,), "uint8"),))
    target, path = Target.parse("native"), tmp_path / "copy.so"
    write_library(plan, target, plain_manifest(plan, target), path)
    with loader.load(path) as model:
        np.testing.assert_array_equal(model()["output_0"], weights[:100])
        address = ctypes.addressof(ctypes.c_char.in_dll(model.library.c, "pumice_weights"))
        assert address % 4096 == 0
        inside = [line for line in Path("/proc/self/maps").read_text().splitlines() if _holds(line, address)]
    assert len(inside) == 1 and inside[0].split()[1] == "r--p" and str(path) in inside[0]


def _holds(line: str, address: int) -> bool:
    start, end = (int(part, 16) for part in line.split()[0].split("-"))
    return start <= address < end


def test_a_plan_runs_as_it_would_ship():
    with link_model(PLAN, Target.parse("native"), 2) as model:
        np.testing.assert_array_equal(model(input_0=np.arange(4, dtype=np.float32))["output_0"], [0, 2, 4, 6])


def test_the_same_module_gives_the_same_bytes(built, tmp_path):
    write_library(PLAN, Target.parse("x86-64"), MANIFEST, tmp_path / "again.so")
    assert (tmp_path / "again.so").read_bytes() == built.read_bytes()
    assert str(tmp_path).encode() not in built.read_bytes()


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
    for old, new, says in ((b'"format":3', b'"format":4', "format 4"), (b'"layers"', b'"lawyer"', "damaged")):
        path = tmp_path / "other.so"
        path.write_bytes(built.read_bytes().replace(old, new))
        with pytest.raises(ModelError, match=says):
            read_manifest(path)


@pytest.mark.parametrize("compiler", ["false", "true"])
def test_a_compiler_that_fails_leaves_the_old_library(monkeypatch, tmp_path, compiler):
    path = tmp_path / "model.so"
    path.write_text("old")
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(MissingDependencyError, match=compiler):
        write_library(PLAN, Target.parse("x86-64"), MANIFEST, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
