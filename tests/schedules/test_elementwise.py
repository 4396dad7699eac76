"""What touches each byte on its own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import ALL_ISAS, RUNNABLE, garbage, run_kernel
from reference import add_u8

from pumice.schedules.elementwise import Add, add, lookup
from pumice.targets.isa import isa


def check_add(isa_name, seed, words, za, zb, zy, clamp, threads=1):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 256, (2, words, 4)).astype(np.uint8)
    ma, mb = (float(np.float32(m)) for m in (rng.random() * 1.5, rng.random() * 1.5))
    work = Add(words, za, ma, zb, mb, zy, *clamp, threads)
    got = run_kernel(add(work, isa(isa_name)), isa_name, a, b, garbage((words, 4), "uint8"))
    np.testing.assert_array_equal(got, add_u8(a, za, ma, b, zb, mb, zy, *clamp))


@settings(max_examples=25)
@given(
    st.sampled_from(RUNNABLE), st.integers(0, 10**6), st.sampled_from([1, 15, 16, 100, 1024, 2085]),
    st.sampled_from([0, 128, 255]), st.sampled_from([0, 255]), st.sampled_from([0, 9, 255]),
    st.sampled_from([(0, 255), (9, 255), (9, 60)]),
)  # fmt: skip
def test_add_equals_the_definition(isa_name, seed, words, za, zb, zy, clamp):
    check_add(isa_name, seed, words, za, zb, zy, clamp)


@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_every_instruction_set_gives_the_same_integers(isa_name):
    check_add(isa_name, 3, 1100, 100, 20, 33, (33, 200))


def test_threads_change_nothing():
    check_add(RUNNABLE[0], 4, 110_000, 100, 20, 33, (33, 200), threads=2)


@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_lookup_is_any_function_of_a_byte(isa_name):
    rng = np.random.default_rng(5)
    x, table = rng.integers(0, 256, (67, 4)).astype(np.uint8), rng.integers(0, 256, 256).astype(np.uint8)
    x.flat[:256] = np.arange(256)
    got = run_kernel(lookup(67, isa(isa_name)), isa_name, x, table, garbage((67, 4), "uint8"))
    np.testing.assert_array_equal(got, table[x])
