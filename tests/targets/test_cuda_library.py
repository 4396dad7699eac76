"""A library for GPUs, from its tables to pumice.h: without a driver, and on a faked one with emulated kernels."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from elf import Elf
from gpu import BESIDE_THIS, FakeDriver, emulated_library, manifest_of, needs_gxx
from lowering import QuantizedNet

from pumice.errors import MissingDependencyError, PumiceError
from pumice.loader import load
from pumice.passes.link_steps import link_steps
from pumice.passes.pipeline import LowerOptions, lower
from pumice.targets.build_cuda import CudaCode
from pumice.targets.cuda_source import cuda_source
from pumice.targets.gpu_plan import gpu_plan
from pumice.targets.library import RUNTIME, write_library
from pumice.targets.target import Target

pytestmark = needs_gxx


@pytest.fixture(scope="module")
def net():
    """Convolutions, one with a stride and a residual, on padded maps."""
    net = QuantizedNet(1, 6, 9, 9)
    x = net.conv_layer(net.start(), "first", 8, padding=(1, 1, 1, 1), density=0.5, relu=True)
    y = net.conv_layer(x, "second", 8, padding=(1, 1, 1, 1), residual=x, relu=True)
    return net, net.conv_layer(y, "third", 12, stride=(2, 2), padding=(1, 1, 1, 1), density=0.3)


@pytest.fixture(scope="module")
def emulated(net, tmp_path_factory):
    net, last = net
    return emulated_library(net.module(last.var), tmp_path_factory.mktemp("cuda") / "model.so", {"x": net.feed})


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return FakeDriver(tmp_path_factory.mktemp("driver"))


def test_a_network_gives_the_numbers_of_the_definition(net, emulated, driver):
    (net, last), launches = net, driver.graph_launches
    with load(emulated.path) as model:
        for _ in range(2):
            np.testing.assert_array_equal(model(x0=net.feed)["y0"], last.real)
    assert driver.graph_launches == launches + 2


def test_it_verifies_and_names_the_first_step_that_differs(emulated, driver):
    with load(emulated.path) as model:
        model.verify()
    weights = bytearray(emulated.path.read_bytes())
    view = next(view for step in emulated.plan.steps if step.layer == "second" for view in step.arguments[1:2])
    blob = emulated.plan.weights.tobytes()
    weights[bytes(weights).index(blob) + view.offset] ^= 64
    broken = emulated.path.with_name("broken.so")
    broken.write_bytes(weights)
    with load(broken) as model, pytest.raises(PumiceError, match=r"second.*damaged"):
        model.verify()


def test_steps_run_one_by_one(net, emulated, driver):
    (net, last), count = net, len(emulated.plan.steps)
    with load(emulated.path) as model:
        result = np.zeros_like(last.real, np.float32)
        for step in range(count):
            model.run([net.feed], [result], step, step + 1)
        np.testing.assert_array_equal(result, last.real)


def test_nothing_is_left_behind(emulated, driver):
    before = driver.live
    with load(emulated.path) as one, load(emulated.path):
        assert driver.live > before
        one(x0=np.zeros(one.inputs[0].shape, np.float32))
    assert driver.live == before


@pytest.mark.parametrize(
    "function",
    [
        "cuDevicePrimaryCtxRetain",
        "cuMemAlloc_v2",
        "cuMemAllocHost_v2",
        "cuMemcpyHtoD_v2",
        "cuModuleLoadData",
        "cuStreamCreate",
        "cuModuleGetFunction",
        "cuLaunchKernel",
        "cuStreamBeginCapture_v2",
        "cuGraphInstantiateWithFlags",
    ],
)
def test_what_fails_at_the_start_is_told_and_leaves_nothing(emulated, driver, function):
    before = driver.live
    with driver.failing(function, 2), pytest.raises(PumiceError, match="CUDA's error 2, out of memory"):
        load(emulated.path)
    assert driver.live == before


@pytest.mark.parametrize("function", ["cuGraphLaunch", "cuStreamSynchronize", "cuCtxPushCurrent_v2"])
def test_what_fails_in_a_run_is_told_and_the_next_may_succeed(net, emulated, driver, function):
    net, last = net
    with load(emulated.path) as model:
        with driver.failing(function), pytest.raises(PumiceError, match="error 719, unspecified launch failure"):
            model(x0=net.feed)
        np.testing.assert_array_equal(model(x0=net.feed)["y0"], last.real)


def test_without_a_gpu_that_there_is_code_for_it_says_what_is_missing(emulated, driver):
    for values, says in (
        ({"gpus": 0}, "finds no GPU"),
        ({"minor": 6}, r"compiled for sm_87@x86-64, and the GPU here, Fake GPU 0, is sm_86"),
        ({"minor": 9}, "is sm_89"),  # code for Orin runs on no other chip
        ({"major": 9}, "is sm_97"),
    ):
        with driver.set(**values), pytest.raises(MissingDependencyError, match=says):
            load(emulated.path)


def test_a_gpu_gets_the_code_that_is_closest_to_it(emulated, tmp_path, driver):
    """All cubins but that of sm_80 are broken."""
    target, good = Target.parse("cuda@x86-64"), emulated.code.cubins["sm_87"]
    cubins = dict.fromkeys(target.gpus, b"broken") | {"sm_80": good}
    path, code = tmp_path / "one.so", replace(emulated.code, cubins=cubins)
    write_library(emulated.plan, target, manifest_of(emulated.plan, target), path, code=code)
    for minor in (0, 5):
        with driver.set(minor=minor):
            load(path).close()
    for minor in (6, 7, 9):
        with driver.set(minor=minor), pytest.raises(PumiceError, match="cannot be loaded into the GPU"):
            load(path)


def test_without_a_driver_it_still_describes_itself(emulated):
    """In a process of its own: in this one there is a driver by now."""
    script = f"""
import ctypes
try:
    ctypes.CDLL("libcuda.so.1")
    print("skip")
except OSError:
    library = ctypes.CDLL({str(emulated.path)!r})
    message, instance = ctypes.create_string_buffer(512), ctypes.c_void_p()
    library.pumice_manifest.restype = library.pumice_step_layer.restype = ctypes.c_char_p
    print(library.pumice_manifest()[:1], library.pumice_step_count(), library.pumice_step_layer(1))
    print(library.pumice_open(1, ctypes.byref(instance), message, ctypes.c_uint64(512)), message.value.decode())
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    if said == "skip\n":
        pytest.skip("this machine has NVIDIA's driver")
    assert said.startswith(f"b'{{' {len(emulated.plan.steps)} b'first'\n5 this model runs on an NVIDIA GPU")
    assert "no driver of NVIDIA's" in said and "install it" in said


def test_without_graphs_the_steps_are_launched_one_by_one(net, emulated, tmp_path):
    """With another driver, so under another name."""
    net, last = net
    old = FakeDriver(tmp_path, "-DWITHOUT_GRAPHS", name="libcudb.so.1")
    before = old.kernel_launches
    path = tmp_path / "other.so"
    path.write_bytes(emulated.path.read_bytes().replace(b"libcuda.so.1", b"libcudb.so.1"))
    with load(path) as model:
        np.testing.assert_array_equal(model(x0=net.feed)["y0"], last.real)
    launches = [emulated.code.launches[step.kernel] for step in emulated.plan.steps]
    assert old.kernel_launches - before == sum(map(len, launches))


def test_the_same_plan_gives_the_same_source(net, tmp_path):
    net, last = net
    texts = set()
    for _ in range(2):
        plan, _ = gpu_plan(link_steps(lower(net.module(last.var), BESIDE_THIS, LowerOptions())), BESIDE_THIS)
        source = cuda_source(plan.kernels)
        CudaCode(plan, source.launches, {"sm_87": b"x"}).write(tmp_path)
        texts.add((source.text, Path(tmp_path, "cuda_model.c").read_text()))
    assert len(texts) == 1


def test_the_runtime_compiles_without_a_warning(tmp_path):
    strict = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O2"]
    subprocess.run(["cc", *strict, "-c", str(RUNTIME / "cuda.c"), "-o", str(tmp_path / "cuda.o")], check=True)


def test_it_is_linked_for_the_cpu_beside_the_gpu(emulated, tmp_path):
    """Jetson Orin has an ARM CPU; what a library then needs is in libc, libm, libdl and libpthread."""
    target = Target.parse("sm_87")
    try:
        write_library(emulated.plan, target, manifest_of(emulated.plan, target), tmp_path / "m.so", code=emulated.code)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    elf = Elf.read(tmp_path / "m.so")
    assert elf.machine == "aarch64"
    assert {name.split(".so")[0] for name in elf.needed} <= {"libc", "libm", "libdl", "libpthread", "ld-linux-aarch64"}
