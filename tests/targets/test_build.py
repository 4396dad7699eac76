"""The entry: ranges of steps, errors, and C callers."""

import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lowering import NATIVE
from tvm import tirx
from tvm.script import tirx as T

from pumice.schedules.copy import copy
from pumice.targets.build import build
from pumice.targets.executor import Executor, build_executor, load_library
from pumice.targets.library import write_library
from pumice.targets.plan import FIRST_INPUT, WORKSPACE, Plan, Step, View, aligned

SIZE = 100
SPEC = ((SIZE,), "uint8")


def plan_of_copies() -> Plan:
    """input -> workspace -> output."""
    steps = (Step("copy", (View(FIRST_INPUT), View(WORKSPACE, 64))), Step("copy", (View(WORKSPACE, 64), View(3))))
    return Plan({"copy": copy(SIZE)}, steps, aligned((0,), "uint8"), 192, (SPEC,), (SPEC,))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of_copies()


@pytest.fixture(scope="module")
def executor(plan) -> Executor:
    return build_executor(plan, NATIVE)


def test_a_step_runs_alone_or_with_the_others(executor):
    executor.inputs[0][:] = np.arange(SIZE)
    executor.outputs[0][:] = 255
    executor.run(0, 1)
    assert (executor.outputs[0] == 255).all()
    executor.inputs[0][:] = 7
    executor.run(1, 2)
    np.testing.assert_array_equal(executor.outputs[0], np.arange(SIZE))
    executor.run(2, 9)
    executor.run(0, 0)
    np.testing.assert_array_equal(executor.outputs[0], np.arange(SIZE))
    executor.run()
    assert (executor.outputs[0] == 7).all()


def test_buffers_are_aligned(executor):
    for buffer in (*executor.inputs, *executor.outputs):
        assert buffer.ctypes.data % 64 == 0


def test_executors_share_nothing_but_the_weights(plan, tmp_path):
    path = tmp_path / "copies.so"
    target = NATIVE
    manifest = {"target": {}, "inputs": [], "outputs": [], "layers": [], "versions": {}}
    write_library(replace(plan, weights=np.arange(50, dtype=np.uint8)), target, manifest, path)
    one, two = (load_library(path, plan.workspace, plan.inputs, plan.outputs) for _ in range(2))
    one.inputs[0][:], two.inputs[0][:] = 1, 2
    one.run(0, 1)
    two.run()
    one.run(1, 2)
    assert (one.outputs[0] == 1).all() and (two.outputs[0] == 2).all()


def test_weights_are_mapped_on_a_page_and_read_only(plan, tmp_path):
    path = tmp_path / "copies.so"
    weights = np.arange(5000).astype(np.uint8)
    manifest = {"target": {}, "inputs": [], "outputs": [], "layers": [], "versions": {}}
    steps = (Step("copy", (View(0), View(3))),)
    write_library(replace(plan, weights=weights, steps=steps), NATIVE, manifest, path)
    executor = load_library(path, plan.workspace, plan.inputs, plan.outputs)
    executor.run()
    np.testing.assert_array_equal(executor.outputs[0], weights[:SIZE])
    library = ctypes.CDLL(str(path))
    address = ctypes.addressof(ctypes.c_char.in_dll(library, "pumice_weights"))
    assert address % 4096 == 0
    inside = [line for line in Path("/proc/self/maps").read_text().splitlines() if _holds(line, address)]
    assert len(inside) == 1 and inside[0].split()[1] == "r--p" and str(path) in inside[0]


def test_c_calls_the_entry(plan, tmp_path):
    path = tmp_path / "copies.so"
    manifest = {"target": {}, "inputs": [], "outputs": [], "layers": [], "versions": {}}
    write_library(plan, NATIVE, manifest, path)
    load_library(path, plan.workspace, plan.inputs, plan.outputs)
    buffers = [aligned((size,), "uint8") for size in (64, plan.workspace, SIZE, SIZE)]
    buffers[2][:] = 9
    pointers = (ctypes.c_void_p * 4)(*(buffer.ctypes.data for buffer in buffers))
    assert ctypes.CDLL(str(path)).pumice_run(pointers, 0, len(plan.steps)) == 0
    assert (buffers[3] == 9).all()


def test_a_kernel_that_fails_stops_the_run(plan):
    """A packed call of a function that does not exist fails at run time."""

    @T.prim_func(private=True)
    def failing(x: T.Buffer((SIZE,), "uint8"), y: T.Buffer((SIZE,), "uint8")):
        T.func_attr({"tirx.noalias": True})
        T.evaluate(T.tvm_call_packed("pumice.no_such_function", 1))
        y[0] = x[0]

    assert isinstance(failing, tirx.PrimFunc)
    broken = replace(
        plan,
        kernels={**plan.kernels, "failing": failing},
        steps=(Step("failing", (View(FIRST_INPUT), View(WORKSPACE))), *plan.steps),
    )
    executor = build_executor(broken, NATIVE)
    executor.outputs[0][:] = 3
    with pytest.raises(Exception, match="no_such_function"):
        executor.run()
    assert (executor.outputs[0] == 3).all()
    executor.run(1)


def test_kernels_take_aligned_pointers_that_do_not_alias(plan):
    source = build(plan, NATIVE).inspect_source("ll")
    (line,) = [line for line in source.splitlines() if line.startswith("define") and "@copy_compute_(" in line]
    assert line.count("noalias") == 2 and line.count("align 64") == 2


def _holds(line: str, address: int) -> bool:
    start, end = (int(part, 16) for part in line.split()[0].split("-"))
    return start <= address < end
