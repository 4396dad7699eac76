"""The check that a library carries: what is stored, and that damage to weights or code is found and named."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from elf import Elf
from lowering import NATIVE
from tiny import tiny_onnx
from tvm.script import tirx as T

import pumice
from pumice import loader
from pumice.cli import main
from pumice.errors import DifferenceError, UsageError
from pumice.passes.contract_products import contract
from pumice.schedules.copy import copy
from pumice.targets.build import build
from pumice.targets.check import checksum
from pumice.targets.library import write_library
from pumice.targets.plan import FIRST_INPUT, WEIGHTS, WORKSPACE, Plan, Step, View, aligned
from pumice.targets.target import Target
from pumice.verify import exact_steps, make_check

SHAPE = (1, 1, 8, 8)
OPTIONS = {"inputs": {"image": SHAPE}}
QUICK = {"equalize": False, "correct_bias": False, "measure_errors": False}


@pytest.fixture(scope="session")
def plan(tmp_path_factory, model_path, samples):
    """The plan that the library of the tests was made of."""
    found = []

    def spy(plan, *arguments):
        found.append(plan)
        write_library(plan, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pumice.driver.write_library", spy)
        pumice.compile(model_path, **OPTIONS, calibration={"image": samples})
    return found[0]


def damaged(library, folder, section, at, value):
    """A copy of the library with other bytes at a place of a section."""
    content = bytearray(library.read_bytes())
    start = content.index(Elf.read(library).sections[section]) + at
    content[start : start + len(value)] = value
    path = folder / "damaged.so"
    path.unlink(missing_ok=True)  # one that is mapped must not change
    path.write_bytes(content)
    return path


def test_a_library_that_is_whole_is_right(library):
    for threads in (1, 2):
        pumice.load(library, threads).verify()


@pytest.mark.parametrize("layer", ["stem", "conv", "fc"])
def test_a_damaged_weight_is_found_in_its_layer(library, plan, tmp_path, capsys, layer):
    step = next(step for step in plan.steps if step.layer == layer)
    at = next(view.offset for view in step.arguments if view.buffer == WEIGHTS)
    path = damaged(library, tmp_path, ".pumice.weights", at, bytes(255 - plan.weights[at : at + 4]))
    with pytest.raises(DifferenceError, match=rf"\({layer}\)"):
        pumice.load(path).verify()
    assert main(["verify", str(path)]) == 6
    assert f"({layer})" in capsys.readouterr().err
    script = shutil.copy(loader.__file__, tmp_path / "loader.py")
    command = [sys.executable, "-I", script, path, "verify"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 6
    assert f"({layer})" in done.stderr


def test_any_damage_of_the_data_is_found_before_it_is_used(library, plan, tmp_path):
    """Lists of blocks say where to read: a kernel that was given a damaged one would read anywhere."""
    stored = len(Elf.read(library).sections[".pumice.check"]) - 1
    for section, size in ((".pumice.weights", plan.weights.nbytes), (".pumice.check", stored)):
        for at in range(0, size, max(1, size // 25)):
            byte = Elf.read(library).sections[section][at]
            path = damaged(library, tmp_path, section, at, bytes([byte ^ 0x10]))
            with pytest.raises(DifferenceError, match="damaged"):
                pumice.load(path).verify()


def test_a_damaged_constant_of_the_code_is_found(library, tmp_path):
    scale = pumice.load(library).layers[0].input_scale
    elf = Elf.read(library)
    for number in (np.float32(scale), np.float32(1 / scale), np.float32(1) / np.float32(scale)):
        for name in [name for name in elf.sections if name.startswith((".rodata", ".text"))]:
            at = elf.sections[name].find(number.tobytes())
            if at >= 0:
                path = damaged(library, tmp_path, name, at, np.float32(1.01 * number).tobytes())
                with pytest.raises(DifferenceError, match=r"step 0 \(pack\)"):
                    pumice.load(path).verify()
                return
    pytest.fail("the scale of the input is nowhere in the code")


def test_the_command_says_that_all_is_right(library, capsys):
    assert main(["verify", str(library)]) == 0
    assert "6 of 6 kernels" in capsys.readouterr().out
    assert main(["verify", str(library), "--threads", "1", "--json"]) == 0
    assert '"exact": 6' in capsys.readouterr().out


def test_the_first_sample_is_stored_and_no_check_stores_none(library, model_path, samples):
    assert Elf.read(library).sections[".pumice.check"].startswith(samples[0].tobytes())
    without = pumice.compile(model_path, **OPTIONS, calibration={"image": samples}, check=False)
    assert samples[0].tobytes() not in without.path.read_bytes()
    with pytest.raises(UsageError, match="--no-check"):
        without.verify()


def test_without_samples_noise_is_stored(tmp_path):
    onnx.save(tiny_onnx(batch=1), tmp_path / "model.onnx")
    compiled = pumice.compile(tmp_path / "model.onnx", quantize=False)
    compiled.verify()
    stored = np.frombuffer(Elf.read(compiled.path).sections[".pumice.check"], np.float32, 64)
    assert 0.5 < stored.std() < 2


def test_another_instruction_set_of_this_machine_writes_what_its_twin_writes(model_path, samples, monkeypatch):
    """What is true for a CPU that is not here, on one that is: the twin's checksums hold for the real code."""
    monkeypatch.setattr("pumice.targets.target.Target.runs_here", False)
    for name in ("x86-64-v3", "x86-64-v4", "x86-64-v4-vnni"):
        compiled = pumice.compile(model_path, **OPTIONS, **QUICK, target=name, calibration={"image": samples})
        if set(compiled.manifest["target"]["features"]) <= loader.host_features():
            compiled.verify()


@T.prim_func(private=True)
def exponential(x: T.Buffer((16,), "float32"), y: T.Buffer((16,), "float32")):
    for i in range(16):
        y[i] = T.exp(x[i])


@T.prim_func(private=True)
def multiply_add(x: T.Buffer((16,), "float32"), y: T.Buffer((16,), "float32")):
    for i in range(16):
        y[i] = x[i] * T.float32(3) + T.float32(1)


def plan_of(*kernels):
    """input -> kernel -> ... -> output, 64 bytes each."""
    places = [View(FIRST_INPUT), *(View(WORKSPACE, 64 * i) for i in range(len(kernels) - 1)), View(FIRST_INPUT + 1)]
    steps = tuple(Step(name, (places[i], places[i + 1]), "", (64,)) for i, (name, _) in enumerate(kernels))
    spec = ((16,), "float32")
    return Plan(dict(kernels), steps, aligned((0,), "uint8"), 64 * len(kernels), (spec,), (spec,))


COPY = ("copy", copy(64, "copy"))
EXP = ("exponential", exponential)
SUM = ("multiply_add", multiply_add)
CONTRACTED = ("multiply_add", contract(multiply_add))

# Not this machine, with fused multiply-adds and without.
FUSING = replace(Target.parse("x86-64-v3"), features=frozenset({"fma", "flying"}))
PLAIN = replace(Target.parse("x86-64"), features=frozenset({"flying"}))


@pytest.mark.parametrize(
    ("kernels", "here", "fusing", "plain"),
    [
        ([COPY, COPY], 2, 2, 2),
        ([COPY, EXP, COPY], 1, 1, 1),
        ([COPY, SUM], 2, 1, 1),
        ([COPY, CONTRACTED], 2, 2, 2),
    ],
)
def test_steps_are_exact_until_one_is_rounded_by_somebody_elses_rules(kernels, here, fusing, plain):
    plan = plan_of(*kernels)
    assert exact_steps(plan, NATIVE) == here
    if "fma" in NATIVE.features:
        assert (exact_steps(plan, FUSING), exact_steps(plan, PLAIN)) == (fusing, plain)


def test_checksums_are_of_what_each_step_writes():
    plan = plan_of(COPY, SUM)
    check = make_check(None, NATIVE, None, plan, build(plan, NATIVE, for_tvm=False))
    (x,) = check.inputs
    expected = (x.astype(np.float64) * 3 + 1).astype(np.float32)
    np.testing.assert_allclose(check.outputs[0], expected, rtol=1e-6)
    assert check.checksums == (checksum(x.tobytes()), checksum(check.outputs[0].tobytes()))


def test_the_checksum_is_the_documented_one():
    assert checksum(b"") == 0xCBF29CE484222325
    product = (0xCBF29CE484222325 ^ 0x636261) * 0x100000001B3 % 2**64
    assert checksum(b"abc") == product ^ (product >> 32)
    assert checksum(b"abc", b"d") == checksum(b"abc" + bytes(5) + b"d") != checksum(b"abcd")


def test_outputs_after_libm_are_compared_within_a_tolerance(tmp_path):
    plan = plan_of(EXP)
    spec = {"shape": [16], "dtype": "float32"}
    target = {"name": "native", "architecture": NATIVE.architecture, "features": []}
    manifest = {"target": target, "layers": [], "versions": {}}
    manifest |= {"inputs": [{"name": "x", **spec}], "outputs": [{"name": "y", **spec}]}
    check = make_check(None, NATIVE, None, plan, build(plan, NATIVE, for_tvm=False))
    assert check.exact == 0
    for factor, is_right in ((1, True), (1.01, True), (1.1, False)):
        check.outputs[0][:] = factor * np.exp(check.inputs[0])
        path = Path(tmp_path, f"{factor}.so")
        write_library(plan, NATIVE, manifest, path, check=check)
        with loader.load(path) as model:
            if is_right:
                model.verify()
            else:
                with pytest.raises(DifferenceError, match="output 'y'"):
                    model.verify()
