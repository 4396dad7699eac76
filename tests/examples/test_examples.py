"""The C and C++ examples, built with any compiler's strictest warnings, on the demo's network."""

import os
import shutil
import subprocess
import zipfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

import pumice
from bench.boxes import START, empty_root, run_start
from pumice.demo.run import to_input
from pumice.loader import read_manifest
from pumice.targets.library import RUNTIME

EXAMPLES = Path(__file__).parents[2] / "examples"
WARNINGS = ["-O2", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{RUNTIME}"]

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="needs a C compiler: apt-get install gcc")


@pytest.fixture(scope="module")
def images():
    return to_input(np.load(files("pumice.demo") / "fashion.npz")["calibration_images"][:16])


@pytest.fixture(scope="module")
def library(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("demo")
    with zipfile.ZipFile(files("pumice.demo") / "fashion.zip") as archive:
        archive.extract("blocks90.onnx", folder)
    compiled = pumice.compile(
        folder / "blocks90.onnx",
        inputs={"image": (1, 1, 28, 28)},
        calibration={"image": images},
        equalize=False,
        correct_bias=False,
        measure_errors=False,
    )
    compiled.save(folder / "model.so")
    return folder / "model.so"


@pytest.fixture(scope="module")
def answer(library, images):
    """The first image, and what Python makes of it."""
    image = library.with_name("image.bin")
    images[0].tofile(image)
    return image, pumice.load(library, threads=1)(images[:1])["logits"].ravel()


@pytest.fixture(scope="module")
def in_c(library):
    return build(library.with_name("run_c"), "gcc", "-std=c11", EXAMPLES / "c" / "run.c", "-ldl")


@pytest.fixture(scope="module")
def in_cpp(library):
    if not shutil.which("g++"):
        pytest.skip("needs a C++ compiler: apt-get install g++")
    return build(library.with_name("run_cpp"), "g++", "-std=c++17", EXAMPLES / "cpp" / "run.cpp", "-ldl", "-pthread")


def build(program: Path, compiler: str, standard: str, source: Path, *libraries: str) -> Path:
    subprocess.run([compiler, standard, *WARNINGS, source, "-o", program, *libraries], check=True)
    return program


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def logits(done: subprocess.CompletedProcess[str]) -> np.ndarray:
    assert done.returncode == 0, done.stderr
    name, _, values = done.stdout.strip().partition(": ")
    assert name == "logits"
    return np.array(values.split(), np.float32)


@pytest.mark.parametrize("threads", [1, 2])
def test_c_gives_the_numbers_that_python_gives(in_c, library, answer, threads):
    image, expected = answer
    np.testing.assert_array_equal(logits(run(in_c, "-t", threads, library, image)), expected)


def test_cpp_gives_them_on_every_thread(in_cpp, library, answer):
    image, expected = answer
    np.testing.assert_array_equal(logits(run(in_cpp, library, image)), expected)


def test_c_describes_and_verifies_the_model(in_c, library):
    described = run(in_c, library).stdout.splitlines()
    assert described == ["input image: float32 1x1x28x28, 3136 bytes", "output logits: float32 1x10, 40 bytes"]
    done = run(in_c, "-t", 2, "-v", library)
    if read_manifest(library).get("check"):
        assert (done.returncode, done.stdout) == (0, "verified\n")
    else:
        assert "stores no input" in done.stderr


@pytest.mark.parametrize("program", ["in_c", "in_cpp"])
def test_what_is_wrong_is_said(program, request, library, answer, tmp_path):
    program, (image, _) = request.getfixturevalue(program), answer
    short = tmp_path / "short.bin"
    short.write_bytes(image.read_bytes()[:-1])
    for arguments in ([image], [library, short], [library, image, image], [library, tmp_path / "none"], []):
        done = run(program, *arguments)
        assert done.returncode == 1 and done.stderr.startswith("run: "), arguments


def test_a_program_may_link_the_model(library, tmp_path):
    source = tmp_path / "linked.c"
    source.write_text(
        '#include <stdio.h>\n#include "pumice.h"\nint main(void) { return puts(pumice_input(0)->name) < 0; }\n'
    )
    build(tmp_path / "linked", "gcc", "-std=c11", source, str(library), f"-Wl,-rpath,{library.parent}")
    assert run(tmp_path / "linked").stdout == "image\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for chroot")
def test_an_empty_root_with_libc_is_enough(in_c, library, answer, tmp_path):
    image, expected = answer
    empty_root(tmp_path, in_c, library)
    shutil.copy(image, tmp_path)
    arguments = ["-t", 2, f"/{library.name}", f"/{image.name}"]
    np.testing.assert_array_equal(logits(run("chroot", tmp_path, f"/{in_c.name}", *arguments)), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_is_that_of_the_weights_and_the_plan_and_a_little(library, tmp_path, threads):
    found = run_start([build(tmp_path / "start", "gcc", "-std=c11", START, "-ldl"), library, str(threads)])
    manifest = read_manifest(library)
    planned = manifest["weights"] + manifest["workspace"] + threads * manifest["scratch"]
    assert 0 < found["own"] < found["resident"] <= planned + (10 << 20)
