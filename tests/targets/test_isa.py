"""The dot product of every instruction set, against plain integers."""

import numpy as np
import pytest
from kernels import ALL_ISAS, garbage, run_kernel

from pumice.schedules import emit
from pumice.targets.isa import isa

STORED = np.array([0, 1, 127, 128, 254, 255], np.uint8)
WEIGHTS = np.array([-128, -127, -1, 0, 1, 127], np.int8)


def dot4(isa_name, acc, x, w):
    """``acc + sum of x * w`` over groups of four bytes, by the instruction set's kernel idiom."""
    instruction_set = isa(isa_name)
    shape = (len(acc), 4)

    def body():
        a, b, c, y = emit.arguments(
            a=((len(acc),), "int32"), b=(shape, "uint8"), c=(shape, "int8"), y=((len(acc),), "int32")
        )

        def strip(i, lanes):
            assert lanes == instruction_set.lanes
            loaded = [emit.load(buffer, i, lanes) for buffer in (a, b, c)]
            emit.store(y, i, instruction_set.dot4(*loaded), lanes)

        emit.for_strips(len(acc), instruction_set.lanes, strip)

    return run_kernel(emit.kernel("dot", body), isa_name, acc, x, w, garbage(acc.shape, "int32"))


def definition(acc, x, w):
    return acc + (x.astype(np.int32) * w.astype(np.int32)).sum(axis=1)


@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_dot_product_of_random_bytes(isa_name):
    rng = np.random.default_rng(0)
    acc = rng.integers(-(2**30), 2**30, 640).astype(np.int32)
    x, w = rng.integers(0, 256, (640, 4)).astype(np.uint8), rng.integers(-128, 128, (640, 4)).astype(np.int8)
    np.testing.assert_array_equal(dot4(isa_name, acc, x, w), definition(acc, x, w))


@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_dot_product_of_extremes_does_not_saturate(isa_name):
    """Every pair of extreme bytes beside every other pair: 2 * 255 * 127 and -2 * 255 * 128 leave int16."""
    pairs = np.array([(a, b) for a in STORED.tolist() for b in WEIGHTS.tolist()])
    first, second = np.repeat(pairs, len(pairs), axis=0), np.tile(pairs, (len(pairs), 1))
    both = np.stack([first, second, second, first], axis=1)
    both = both[: len(both) // 16 * 16]
    x, w = both[:, :, 0].astype(np.uint8), both[:, :, 1].astype(np.int8)
    acc = np.zeros(len(x), np.int32)
    np.testing.assert_array_equal(dot4(isa_name, acc, x, w), definition(acc, x, w))


@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_four_products_fill_one_accumulator(isa_name):
    x, w = np.full((16, 4), 255, np.uint8), np.full((16, 4), -128, np.int8)
    acc = np.full(16, -(2**31) + 4 * 255 * 128, np.int32)
    assert (dot4(isa_name, acc, x, w) == -(2**31)).all()


def test_unknown_names_are_errors():
    with pytest.raises(KeyError):
        isa("mmx")
