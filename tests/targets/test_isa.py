"""The dot product of every instruction set, against plain integers."""

import arm
import kernels
import numpy as np
import pytest
from kernels import ALL_ISAS, garbage, run_kernel

from pumice.schedules import emit
from pumice.schedules.blocks import has_lowest_pairs
from pumice.targets.isa import isa

STORED = np.array([0, 1, 127, 128, 254, 255], np.uint8)
WEIGHTS = np.array([-128, -127, -1, 0, 1, 127], np.int8)


def dot4(isa_name, acc, x, w, instruction_set=None):
    """``acc + sum of x * w`` over groups of four bytes, by the instruction set's kernel idiom."""
    instruction_set = instruction_set or isa(isa_name)
    acc = acc + np.int32(instruction_set.sign) * w.sum(axis=1, dtype=np.int32)
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


def extremes():
    """Every pair of extreme bytes beside every other pair: 2 * 255 * 127 and -2 * 255 * 128 leave int16."""
    pairs = np.array([(a, b) for a in STORED.tolist() for b in WEIGHTS.tolist()])
    first, second = np.repeat(pairs, len(pairs), axis=0), np.tile(pairs, (len(pairs), 1))
    both = np.stack([first, second, second, first], axis=1)
    both = both[: len(both) // 16 * 16]
    return both[:, :, 0].astype(np.uint8), both[:, :, 1].astype(np.int8)


@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_dot_product_of_extremes_does_not_saturate(isa_name):
    x, w = extremes()
    acc = np.zeros(len(x), np.int32)
    np.testing.assert_array_equal(dot4(isa_name, acc, x, w), definition(acc, x, w))


@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_four_products_fill_one_accumulator(isa_name):
    x, w = np.full((16, 4), 255, np.uint8), np.full((16, 4), -128, np.int8)
    acc = np.full(16, -(2**31) + 4 * 255 * 128, np.int32)
    assert (dot4(isa_name, acc, x, w) == -(2**31)).all()


@arm.needs_emulation
@pytest.mark.parametrize("isa_name", arm.TARGETS)
def test_dot_product_on_arm(isa_name):
    x, w = extremes()
    acc = np.arange(len(x), dtype=np.int32)
    cautious = isa(isa_name).for_weights(has_lowest_pairs(w))
    np.testing.assert_array_equal(dot4(isa_name, acc, x, w, cautious), definition(acc, x, w))
    usual = [i for i in range(len(w)) if not has_lowest_pairs(w[i])]
    few = [array[usual[: len(usual) // 4 * 4]] for array in (acc, x, w)]
    assert isa(isa_name).for_weights(has_lowest_pairs(few[2])) is isa(isa_name)
    np.testing.assert_array_equal(dot4(isa_name, *few), definition(*few))


def test_only_two_of_the_lowest_weights_in_half_a_word_need_care():
    words = np.array([[-128, -127, 5, -128], [0, -128, -128, 0]], np.int8)
    assert not has_lowest_pairs(words)
    assert has_lowest_pairs(np.array([[1, 2, -128, -128]], np.int8))
    assert not has_lowest_pairs(np.full((2, 1), -128, np.float32))


@pytest.mark.parametrize("isa_name", ["vnni512", "avx512bw", "avx2", *arm.TARGETS])
def test_a_twin_multiplies_alike(isa_name, monkeypatch):
    monkeypatch.setattr(arm, "TARGETS", {})
    monkeypatch.setitem(kernels.TARGETS, isa_name, "native")
    x, w = extremes()
    acc = np.arange(len(x), dtype=np.int32)
    np.testing.assert_array_equal(dot4(isa_name, acc, x, w, isa(isa_name).twin()), definition(acc, x, w))


@pytest.mark.parametrize("isa_name", ["vnni512", "avx2"])
def test_a_twin_permutes_alike(isa_name, monkeypatch):
    monkeypatch.setitem(kernels.TARGETS, isa_name, "native")
    twin, rng = isa(isa_name).twin(), np.random.default_rng(1)
    words, index = rng.integers(-99, 99, twin.window), rng.integers(0, twin.window, twin.lanes)

    def body():
        a, i, y = emit.arguments(**{name: ((size,), "int32") for name, size in sizes.items()})
        tables = [emit.load(a, at, twin.lanes) for at in range(0, twin.window, twin.lanes)]
        emit.store(y, 0, twin.permute(tables, emit.load(i, 0, twin.lanes)), twin.lanes)

    sizes = {"a": twin.window, "i": twin.lanes, "y": twin.lanes}
    arrays = [words.astype(np.int32), index.astype(np.int32), garbage((twin.lanes,), "int32")]
    np.testing.assert_array_equal(run_kernel(emit.kernel("permute", body), isa_name, *arrays), words[index])


def test_unknown_names_are_errors():
    with pytest.raises(KeyError):
        isa("mmx")
