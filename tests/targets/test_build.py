"""The entry: ranges of steps, errors, and C callers."""

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from lowering import NATIVE
from tvm.script import tirx as T

from pumice.errors import UnsupportedError
from pumice.schedules.copy import copy
from pumice.targets.build import build
from pumice.targets.executor import Executor, build_executor
from pumice.targets.plan import FIRST_INPUT, WORKSPACE, Plan, Step, View, aligned

SIZE = 100
SPEC = ((SIZE,), "uint8")


def plan_of_copies() -> Plan:
    """input -> workspace -> output."""
    steps = (
        Step("copy", (View(FIRST_INPUT), View(WORKSPACE, 64))),
        Step("copy", (View(WORKSPACE, 64), View(FIRST_INPUT + 1))),
    )
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


def test_tasks_share_a_kernel(plan):
    """Every task for itself computes the kernel's own large buffer; the parallel loop is cut; the rest is task 0's."""

    @T.prim_func(private=True)
    def shared(x: T.Buffer((10,), "int32"), y: T.Buffer((10,), "int32")):
        T.func_attr({"tirx.noalias": True})
        own = T.alloc_buffer((1000,), "int32", scope="global")
        for i in range(1000):
            own[i] = x[i % 10] + 1
        for i in T.parallel(10):
            y[i] = own[i] * 2

    @T.prim_func(private=True)
    def alone(x: T.Buffer((10,), "int32"), y: T.Buffer((10,), "int32")):
        T.func_attr({"tirx.noalias": True})
        for i in T.parallel(10):
            y[i] = x[i]
        y[3] = 77

    spec = ((10,), "int32")
    steps = (
        Step("shared", (View(FIRST_INPUT), View(WORKSPACE)), outputs=(40,)),
        Step("alone", (View(WORKSPACE), View(FIRST_INPUT + 1)), outputs=(40,)),
    )
    code = build(Plan({"shared": shared, "alone": alone}, steps, plan.weights, 64, (spec,), (spec,)), NATIVE)
    assert code.scratch == 4032
    x, y, workspace = np.arange(10, dtype=np.int32), aligned((10,), "int32"), aligned((64,), "uint8")
    y[:] = 0
    workspace[:] = 0
    scratches = [aligned((code.scratch,), "uint8") for _ in range(3)]

    def run(step: int, task: int) -> None:
        buffers = (plan.weights, workspace, scratches[task], x, y)
        table = np.array([buffer.ctypes.data for buffer in buffers], np.uint64)
        code.module["pumice_steps"](ctypes.c_void_p(table.ctypes.data), step, step + 1, task, 3)

    run(0, 2)
    np.testing.assert_array_equal(workspace.view("int32")[:10], [0] * 6 + [14, 16, 18, 20])
    run(0, 0)
    run(0, 1)
    np.testing.assert_array_equal(workspace.view("int32")[:10], np.arange(2, 22, 2))
    run(1, 1)
    assert (y == 0).all()
    run(1, 0)
    np.testing.assert_array_equal(y, [2, 4, 6, 77, 10, 12, 14, 16, 18, 20])


def test_nothing_of_tvms_runtime_is_called(plan, tmp_path):
    """A buffer that TVM would allocate is scratch; a function that only TVM has is refused."""

    @T.prim_func(private=True)
    def with_registers(x: T.Buffer((10,), "int32"), y: T.Buffer((10,), "int32")):
        T.func_attr({"tirx.noalias": True})
        own = T.alloc_buffer((10,), "int32", scope="local")
        for i in range(10):
            own[i] = x[i] + 1
        for i in range(10):
            y[i] = own[9 - i]

    @T.prim_func(private=True)
    def calling(x: T.Buffer((10,), "int32"), y: T.Buffer((10,), "int32")):
        T.func_attr({"tirx.noalias": True})
        T.evaluate(T.tvm_call_packed("somebody.elses", 1))
        y[0] = x[0]

    spec = ((10,), "int32")
    step = Step("kernel", (View(FIRST_INPUT), View(FIRST_INPUT + 1)), outputs=(40,))
    plans = [Plan({"kernel": f}, (step,), plan.weights, 0, (spec,), (spec,)) for f in (with_registers, calling)]
    code = build(plans[0], NATIVE, for_tvm=False)
    assert code.scratch == 64 and code.write(tmp_path) == ["code.o"]
    with pytest.raises(UnsupportedError, match=r"TVMFuncCall|TVMFFI"):
        build(plans[1], NATIVE, for_tvm=False).write(tmp_path)


def test_the_callers_buffers_may_lie_anyhow(plan):
    code = build(plan, NATIVE)
    x, y = (np.zeros(SIZE + 1, np.uint8)[1:] for _ in range(2))
    x[:] = np.arange(SIZE)
    buffers = (plan.weights, aligned((plan.workspace,), "uint8"), plan.weights, x, y)
    table = np.array([buffer.ctypes.data for buffer in buffers], np.uint64)
    code.module["pumice_steps"](ctypes.c_void_p(table.ctypes.data), 0, 2, 0, 1)
    np.testing.assert_array_equal(x, y)


def test_kernels_take_aligned_pointers_that_do_not_alias(plan):
    steps = (Step("copy", (View(WORKSPACE), View(FIRST_INPUT + 1))),)
    source = build(replace(plan, steps=steps), NATIVE).module.inspect_source("ll")
    (line,) = [line for line in source.splitlines() if line.startswith("define") and "@copy_compute_(" in line]
    assert line.count("noalias") == 2 and line.count("align 64") == 1
