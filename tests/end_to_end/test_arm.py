"""Networks compiled for ARM and run under qemu: the same numbers as on the machine that compiled them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from elf import Elf
from emulation import NEWEST, build_program, emulator

from pumice.demo.run import SHAPE, DemoData, read_data
from pumice.driver import compile_model
from pumice.frontend import read_model
from pumice.passes.link_steps import link_steps
from pumice.passes.pipeline import LowerOptions, lower
from pumice.prepare import prepare
from pumice.recipe import Recipe
from pumice.stages import Stages
from pumice.targets.build import build
from pumice.targets.executor import build_executor
from pumice.targets.library import write_library
from pumice.targets.target import Target
from pumice.verify import make_check

IMAGES = 200
RUN_EACH = Path(__file__).with_name("run_each.c")
EXAMPLE = Path(__file__).parents[2] / "examples" / "c" / "run.c"
WRONG_CPU = 4

LEVELS = [("armv8-a", "cortex-a53"), ("armv8.2-a+dotprod", "cortex-a76"), ("armv8.6-a+i8mm", NEWEST)]

Libraries = Callable[..., Path]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DemoData:
    return read_data(Path(str(files("pumice.demo"))), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def network(data):
    """The sparse network in int8: what all targets lower."""
    mod = read_model(data.models["blocks90"], {"image": SHAPE})
    options = Recipe(equalize=False, correct_bias=False)
    return prepare(mod, options, {"image": data.calibration_images[:100]}, None, Stages(None))


@pytest.fixture(scope="module")
def expected(network, data) -> np.ndarray:
    """The logits of every image on this machine."""
    target = Target.parse("native")
    executor = build_executor(link_steps(lower(network, target, LowerOptions(1))), target)
    logits = []
    for image in data.test_images[:IMAGES]:
        executor.inputs[0][:] = image
        executor.run()
        logits.append(executor.outputs[0].copy())
    return np.concatenate(logits)


@pytest.fixture(scope="module")
def library(network, data, tmp_path_factory) -> Libraries:
    """The network's library for a target and a C library, with a stored input to verify it; each is made once."""

    @cache
    def compiled(name: str):
        target, options = Target.parse(name), LowerOptions(3)
        plan = link_steps(lower(network, target, options))
        code = build(plan, target, for_tvm=False)
        return plan, target, code, make_check(network, target, options, plan, code, {"image": data.test_images[:1]})

    @cache
    def make(name: str, libc: str | None = None) -> Path:
        plan, target, code, check = compiled(name)
        path = tmp_path_factory.mktemp("library") / "model.so"
        manifest = {"inputs": [{"name": "image"}], "outputs": [{"name": "logits"}]}
        write_library(plan, target, manifest, path, libc, check, code)
        return path

    return make


def run_each(library: Path, cpu: str, samples: bytes, threads: int = 1, libc: str | None = None):
    """The finished process, and the floats that it wrote."""
    command = emulator(cpu)
    program = build_program(Target.parse("armv8-a"), RUN_EACH, library, libc)
    given, written = library.with_name("samples"), library.with_name("results")
    given.write_bytes(samples)
    done = subprocess.run(
        [*command, program, given, written, str(threads)], capture_output=True, text=True, check=False
    )
    return done, np.fromfile(written, np.float32)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("name", "cpu"), LEVELS)
def test_every_level_gives_the_same_numbers(library, data, expected, name, cpu, threads):
    emulator(cpu)
    done, logits = run_each(library(name), cpu, data.test_images[:IMAGES].tobytes(), threads)
    assert (done.returncode, done.stderr) == (0, "")
    np.testing.assert_array_equal(logits.reshape(-1, 10), expected)
    assert np.mean(logits.reshape(-1, 10).argmax(1) == data.test_labels[:IMAGES]) > 0.9


@pytest.mark.parametrize(("name", "cpu"), LEVELS)
def test_the_example_in_c_verifies_every_step(library, name, cpu):
    command = emulator(cpu)
    program = build_program(Target.parse(name), EXAMPLE, library(name), links=False)
    done = subprocess.run([*command, program, "-v", library(name)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_library_for_an_old_glibc_gives_the_same_numbers(library, data, expected):
    emulator("max")
    path = library("armv8.2-a+dotprod", "glibc-2.28")
    assert Elf.read(path).glibc <= (2, 28)
    done, logits = run_each(path, "cortex-a76", data.test_images[:20].tobytes(), libc="glibc-2.28")
    assert (done.returncode, done.stderr) == (0, "")
    np.testing.assert_array_equal(logits.reshape(-1, 10), expected[:20])


@pytest.mark.parametrize(
    ("name", "cpu", "lacks"),
    [("armv8.2-a+dotprod", "cortex-a53", "asimddp"), ("armv8.6-a+i8mm", "cortex-a76", "i8mm")],
)
def test_a_cpu_that_is_too_old_is_told_so(library, data, name, cpu, lacks):
    emulator(cpu)
    done, logits = run_each(library(name), cpu, data.test_images[:1].tobytes())
    assert done.returncode == WRONG_CPU and not logits.size
    assert "this CPU lacks" in done.stderr and lacks in done.stderr and name in done.stderr


def test_the_floats_of_a_transformer_are_exact(tmp_path):
    """To the last bit in every step, though not one of these numbers came from ARM."""
    torch = pytest.importorskip("torch", reason="the network is made by PyTorch: pip install torch")
    from transformer import SHAPE, Encoder

    command, path = emulator("cortex-a53"), tmp_path / "model.so"
    compiled = compile_model(Encoder().eval(), inputs=(torch.zeros(SHAPE),), quantize=False, target="armv8-a")
    compiled.save(path)
    assert compiled.manifest["check"]["exact"] == len(compiled.manifest["steps"])
    program = build_program(Target.parse("armv8-a"), EXAMPLE, path, links=False)
    done = subprocess.run([*command, program, "-v", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("subject", ["mobilenet", "minilm"])
def test_larger_networks_give_the_same_numbers(subject, tmp_path):
    pytest.importorskip("torch")
    from bench.subjects import SUBJECTS

    emulator("max")
    model, feed = SUBJECTS[subject].model(), SUBJECTS[subject].feed(2)
    options = {"calibration": feed, "prune": "magnitude:1x4:0.9", "equalize": False, "correct_bias": False}
    options |= {"measure_errors": False, "threads": 1}
    sample = {name: values[:1] for name, values in feed.items()}
    (here,) = compile_model(model, **options)(sample).values()
    for name, cpu in LEVELS:
        path = tmp_path / f"{name}.so"
        compiled = compile_model(model, target=name, **options)
        compiled.save(path)
        samples = b"".join(sample[spec.name].astype(spec.dtype).tobytes() for spec in compiled.inputs)
        done, numbers = run_each(path, cpu, samples)
        assert (done.returncode, done.stderr) == (0, "")
        np.testing.assert_array_equal(numbers, here.ravel())
