"""CUDA source and its launches, and the emulation that runs it on this CPU."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from cuda_kernels import emulate
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.errors import UnsupportedError
from pumice.schedules import emit
from pumice.targets.cuda_emulation import Emulation, EmulationError
from pumice.targets.cuda_source import Launch, cuda_source

THREADS = 64


def kernel(body: Callable, outputs=THREADS, dtype="int32"):
    """A function ``y[64] = body(x[64])`` of one block; ``body(x, y, thread)`` writes it."""

    def declare():
        x, y = emit.argument("x", (THREADS,), dtype), emit.argument("y", (outputs,), dtype)
        with T.launch_thread("blockIdx.x", 1), T.launch_thread("threadIdx.x", THREADS) as thread:
            body(x, y, thread)

    return emit.kernel("f", declare)


def run(function, x, reverse=False):
    y = np.full(THREADS, -1, x.dtype)
    emulate({"f": function}).run("f", x, y, is_reversed=reverse)
    return y


def test_a_launch_says_how_and_with_what():
    def declare():
        x, y = emit.arguments(x=((6, 8, 4), "uint8"), y=((6, 8), "int32"))
        with (
            T.launch_thread("blockIdx.y", 3) as row,
            T.launch_thread("blockIdx.x", 2) as half,
            T.launch_thread("threadIdx.y", 2) as r,
            T.launch_thread("threadIdx.x", 4) as lane,
        ):
            place = (row * 2 + r) * 8 + half * 4 + lane
            T.buffer_store(y, x[place], [place])

    source = cuda_source({"copy": emit.kernel("copy", declare)})
    (launch,) = source.launches["copy"]
    assert launch == Launch("copy_kernel", (2, 3, 1), (4, 2, 1), 0, launch.arguments)
    assert sorted(launch.arguments) == [0, 1]
    assert "__global__ void __launch_bounds__(8) copy_kernel" in source.text
    x, y = np.arange(192, dtype=np.uint8).reshape(6, 8, 4), np.zeros((6, 8), np.int32)
    emulate({"copy": emit.kernel("copy", declare)}).run("copy", x, y)
    np.testing.assert_array_equal(y, x.view(np.int32)[..., 0])


def test_a_loop_that_no_thread_is_bound_to_is_refused():
    def declare():
        x, y = emit.arguments(x=((8,), "int32"), y=((8,), "int32"))
        with T.serial(0, 8) as i:
            T.buffer_store(y, x[i], [i])

    with pytest.raises(UnsupportedError, match="bind all of its loops to threads"):
        cuda_source({"f": emit.kernel("f", declare)})


def test_what_tvm_cannot_lower_is_refused_by_its_name():
    def call(x, y, thread):
        T.evaluate(T.call_packed("elsewhere", thread))
        T.buffer_store(y, x[thread], [thread])

    with pytest.raises(UnsupportedError, match=r"'odd': TVM cannot make CUDA code of it .*tvm_call_packed"):
        cuda_source({"fine": kernel(turned_around), "odd": kernel(call)})


def test_arithmetic_is_not_fused_unless_it_is_said_so():
    x = np.linspace(1, 2, THREADS, dtype=np.float32) * np.float32(1 + 2**-12)

    def apart(x, y, thread):
        T.buffer_store(y, x[thread] * x[thread] - tirx.const(1.0, "float32"), [thread])

    def fused(x, y, thread):
        T.buffer_store(y, emit.fma(x[thread], x[thread], tirx.const(-1.0, "float32"), 1), [thread])

    np.testing.assert_array_equal(run(kernel(apart, dtype="float32"), x), x * x - np.float32(1))
    exact = (x.astype(np.float64) ** 2 - 1).astype(np.float32)
    np.testing.assert_array_equal(run(kernel(fused, dtype="float32"), x), exact)
    assert (exact != x * x - np.float32(1)).any()


@pytest.mark.parametrize("reverse", [False, True])
def test_threads_see_each_other_through_shared_memory_and_shuffles(reverse):
    x = np.arange(THREADS, dtype=np.int32) * 3

    def body(x, y, thread):
        shared = T.alloc_buffer((THREADS,), "int32", scope="shared")
        T.buffer_store(shared, x[thread], [thread])
        T.evaluate(T.tvm_storage_sync("shared"))
        everyone = tirx.const(0xFFFFFFFF, "uint32")
        crossed = tirx.call_extern("int32", "__shfl_xor_sync", everyone, x[thread], 5)
        T.buffer_store(y, shared[THREADS - 1 - thread] * 1000 + crossed, [thread])

    got = run(kernel(body), x, reverse)
    np.testing.assert_array_equal(got, x[::-1] * 1000 + x[np.arange(THREADS) ^ 5])


def turned_around(x, y, thread):
    """Each thread takes what another has put into shared memory."""
    shared = T.alloc_buffer((THREADS,), "int32", scope="shared")
    T.buffer_store(shared, x[thread], [thread])
    T.evaluate(T.tvm_storage_sync("shared"))
    T.buffer_store(y, shared[THREADS - 1 - thread], [thread])


def test_a_missing_barrier_shows():
    source = cuda_source({"f": kernel(turned_around)})
    without = replace(source, text=source.text.replace("__syncthreads();", ""))
    x = np.arange(THREADS, dtype=np.int32)
    for text, is_right in ((source, True), (without, False)):
        y = np.zeros(THREADS, np.int32)
        Emulation(text).run("f", x, y)
        assert (y == x[::-1]).all() == is_right


@pytest.mark.parametrize(("place", "reverse"), [(THREADS, False), (-1, True)])
def test_what_lies_outside_is_not_touched(place, reverse):
    def read(x, y, thread):
        T.buffer_store(y, x[tirx.Select(thread == 9, place, thread)], [thread])

    def write(x, y, thread):
        T.buffer_store(y, x[thread], [tirx.Select(thread == 9, place, thread)])

    for body in (read, write):
        with pytest.raises(EmulationError, match="'f_kernel', emulated: it touched memory outside of its arguments"):
            run(kernel(body), np.zeros(THREADS, np.int32), reverse)


def test_what_is_read_under_a_condition_is_not_read_before():
    def body(x, y, thread):
        before = tirx.if_then_else(thread > 0, x[thread - 1] * tirx.const(2.0, "float32"), tirx.const(0.0, "float32"))
        T.buffer_store(y, before, [thread])

    x = np.arange(THREADS, dtype=np.float32)
    np.testing.assert_array_equal(run(kernel(body, dtype="float32"), x, reverse=True), 2 * np.maximum(x - 1, 0))


def test_a_barrier_that_some_threads_miss_is_an_error():
    def body(x, y, thread):
        with T.If(thread < 40), T.Then():
            T.evaluate(tirx.call_extern("int32", "__syncthreads"))
        T.buffer_store(y, x[thread], [thread])

    with pytest.raises(EmulationError, match="not all threads of a block came to the same barrier"):
        run(kernel(body), np.zeros(THREADS, np.int32))
