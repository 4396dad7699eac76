"""Libraries for a chosen C library: the same numbers, out of no more than was asked for."""

import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from elf import Elf
from emulation import build_program
from tiny import tiny_onnx

import pumice
from pumice.cli import main
from pumice.targets.detect import host_architecture
from pumice.targets.target import Target
from pumice.targets.toolchain import find_toolchain

RUN_EACH = Path(__file__).with_name("run_each.c")
SHAPE = (1, 1, 8, 8)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


@pytest.fixture(scope="module")
def expected(image) -> np.ndarray:
    """By a library for this system's own C library."""
    return pumice.compile(tiny_onnx(), inputs={"image": SHAPE}, quantize=False, threads=2)(image)["logits"]


def needs(libc: str) -> None:
    try:
        find_toolchain(Target.parse("native"), libc)
    except pumice.PumiceError as error:
        pytest.skip(str(error))


def test_a_chosen_glibc(tmp_path, image, expected):
    needs("glibc-2.17")
    onnx.save(tiny_onnx(), tmp_path / "model.onnx")
    options = ["--input", "image=1x1x8x8", "--no-quantize", "--glibc", "2.17"]
    assert main(["compile", str(tmp_path / "model.onnx"), "-o", str(tmp_path / "model.so"), *options]) == 0
    elf = Elf.read(tmp_path / "model.so")
    assert (2, 2, 5) <= elf.glibc <= (2, 17)
    assert set(elf.needed) <= {"libc.so.6", "libm.so.6", "libpthread.so.0"}
    np.testing.assert_array_equal(pumice.load(tmp_path / "model.so")(image)["logits"], expected)


def test_musl(tmp_path, image, expected):
    needs("musl")
    if not Path(f"/lib/ld-musl-{host_architecture()}.so.1").exists():
        pytest.skip("musl's loader is not installed: `apt-get install musl`")
    path = tmp_path / "model.so"
    model = pumice.compile(tiny_onnx(), inputs={"image": SHAPE}, quantize=False, libc="musl")
    model.save(path)
    assert Elf.read(path).needed == ["libc.so"] and not Elf.read(path).glibc
    program = build_program(Target.parse("native"), RUN_EACH, path, "musl")
    image.tofile(tmp_path / "image")
    subprocess.run([program, tmp_path / "image", tmp_path / "logits", "2"], check=True)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "logits", np.float32), expected.ravel())


@pytest.mark.parametrize("libc", [["--glibc", "2"], ["--glibc", "2.28", "--musl"]])
def test_what_is_no_c_library_is_refused(tmp_path, libc):
    onnx.save(tiny_onnx(), tmp_path / "model.onnx")
    command = ["compile", str(tmp_path / "model.onnx"), "-o", str(tmp_path / "model.so"), *libc]
    try:
        code = main(command)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert not (tmp_path / "model.so").exists()
