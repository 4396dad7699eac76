"""Dense int8 and two of four weights on tensor cores, against the definition; instructions are emulated by layout."""

import numpy as np
import pytest
from cuda_kernels import emulate
from kernels import (
    fold_zero_point,
    garbage,
    geometry_for,
    is_padding,
    output_size,
    packed_of,
    padded,
    phases_of,
    unpacked,
)
from reference import Residual as ReferenceResidual
from reference import conv_accumulate, conv_int8, layer_float32

from pumice.errors import MissingDependencyError
from pumice.schedules.cuda.fragments import fragments, why_not_two_of_four
from pumice.schedules.cuda.mma import MmaLayer, mma_constants, mma_layer, mma_words, on_tensor_cores
from pumice.schedules.epilogue import Epilogue, Residual
from pumice.schedules.geometry import Geometry, Window
from pumice.schedules.places import Places
from pumice.targets.cuda_source import cuda_source
from pumice.targets.nvcc import find_nvcc

ONE = Window((1, 1))
AROUND = Window((3, 3), padding=(1, 1))


def two_left(rng, n, c, kernel):
    """int8 OIHW with two weights at most in every four inputs, at random places; some rows are empty."""
    shape = (n, -(-c // 4), 4, *kernel)
    kept = rng.random(shape).argsort(axis=2).argsort(axis=2) < rng.integers(0, 3, (n, shape[1], 1, *kernel))
    kept[rng.random(n) < 0.1] = False
    return (rng.integers(-128, 128, (n, c, *kernel)) * kept.reshape(n, -1, *kernel)[:, :c]).astype(np.int8)


class Case:
    def __init__(
        self, seed, x_shape, n, window=ONE, is_sparse=True, *, zx=3, zy=5, residual=False, output="uint8", words=None,
        **shape,
    ):  # fmt: skip
        rng = np.random.default_rng(seed)
        x, self.n = rng.integers(0, 256, x_shape).astype(np.uint8), n
        weight = two_left(rng, n, x_shape[1], window.kernel)
        if not is_sparse:
            weight = rng.integers(-128, 128, weight.shape).astype(np.int8)
        self.weight = weight
        bias = rng.integers(-3000, 3000, n).astype(np.int32)
        m = (rng.random(n) * 2e-3 / np.sqrt(weight[0].size)).astype(np.float32)
        out_shape = (x_shape[0], n, *output_size(x_shape[2:], window))
        around = (*window.padding, *window.padding)
        self.target = geometry_for(x.shape, out_shape, window)
        places = Places(window, self.target, self.target)
        if output == "float32":
            spec, other, epilogue = None, None, Epilogue("float32", None, 0, -np.inf, np.inf)
            acc = conv_accumulate(x, zx, weight, bias, window.stride, around)
            self.want, self.padding = layer_float32(acc, m.reshape(1, -1, 1, 1)), 0
        else:
            spec = Residual(float(np.float32(0.37)), 129) if residual else None
            other = rng.integers(0, 256, out_shape).astype(np.uint8) if residual else None
            epilogue = Epilogue("uint8", spec, zy)
            reference = ReferenceResidual(other, spec.zero_point, spec.multiplier) if residual else None
            self.want = conv_int8(x, zx, weight, bias, m, zy, reference, stride=window.stride, padding=around)
            self.padding = zy
        rows = weight.reshape(n, x_shape[1], -1).transpose(0, 2, 1)
        assert not is_sparse or why_not_two_of_four(rows) is None
        source = phases_of(x, self.target, window, zx)
        words = words or mma_words(-(-x_shape[1] // 4), places, is_sparse)
        many = -(-n // 4) * 4
        self.work = MmaLayer(source.shape[0], many, -(-x_shape[1] // 4), places, epilogue, is_sparse, words, **shape)
        self.arrays = [source, *mma_constants(rows, self.work).values()]
        self.arrays += [padded(fold_zero_point(weight, bias, zx), many), padded(m, many)]
        self.arrays += [] if other is None else [packed_of(other, self.target, 99)]
        self.arrays += [np.where(is_padding(self.target), 0, -1).astype(np.int32)] if self.target.is_padded else []
        positions = self.target.positions
        out = (many // 4, positions, 4) if output == "uint8" else (many, positions, 1)
        self.arrays.append(garbage(out, output))


def check(cases):
    emulation = emulate({f"layer{i}": mma_layer(case.work, f"layer{i}") for i, case in enumerate(cases)})
    for i, case in enumerate(cases):
        for is_reversed in (False, True):
            arrays = [array.copy() for array in case.arrays]
            emulation.run(f"layer{i}", *arrays, is_reversed=is_reversed)
            np.testing.assert_array_equal(unpacked(arrays[-1], case.target, case.n), case.want)
            if case.target.is_padded:
                assert (arrays[-1][:, is_padding(case.target)] == case.padding).all()


@pytest.mark.parametrize("is_sparse", [True, False])
def test_int8_equals_the_definition(is_sparse):
    rng = np.random.default_rng(1)
    random = [
        Case(
            seed, (1, int(rng.integers(1, 300)), 1, int(rng.integers(2, 150))), int(rng.integers(1, 100)), ONE,
            is_sparse, residual=seed % 2 == 0, warps=int(rng.integers(1, 5)), columns=int(rng.choice([1, 2, 4, 8])),
            words=int(rng.choice([1, 7, 16, 33])),
        )
        for seed in range(6)
    ]  # fmt: skip
    maps = [
        Case(20, (2, 22, 11, 27), 13, AROUND, is_sparse, residual=True),
        Case(21, (1, 40, 9, 9), 40, Window((3, 3), (2, 2), padding=(1, 1)), is_sparse, words=3),
        Case(22, (1, 130, 1, 33), 50, ONE, is_sparse, output="float32"),
    ]
    check([*random, *maps])


def places_in(shape, stride):
    """A layout as CUTLASS writes it: where each index goes, the first axis fastest."""
    places = np.zeros(1, int)
    for size, step in zip(shape, stride, strict=True):
        places = (np.arange(size)[:, None] * step + places).ravel()
    return places


def test_fragments_have_the_layouts_of_cutlass():
    """``ALayout`` and ``ELayout`` of ``SM120_SPARSE_16x8x64_TN``: from lane and value to row + 16 * input."""
    rows = two_left(np.random.default_rng(5), 32, 64, (1, 1))[:, :, 0].swapaxes(1, 2)
    weight = fragments(rows, True, 16)
    fours = slice(None, None, 4)
    values = places_in((4, 8), (128, 1))[:, None] + places_in((8, 2, 2), (16, 8, 512))[fours]
    nibbles = places_in((2, 2, 8), (8, 512, 1))[:, None] + places_in((32,), (16,))[fours]
    for instruction in range(2):
        data = weight.data[0, 0, 0, instruction].reshape(32, 8, 2)
        metadata = weight.metadata[0, 0, 0, instruction].view(np.uint32)
        which, tile = np.zeros(16 * 64, int), np.zeros(16 * 64, np.int8)
        which[nibbles] = metadata[:, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
        first, second = which[values] & 3, which[values] >> 2
        assert (first < second).all()  # ``mma.sp::ordered_metadata``
        tile[values + 16 * first], tile[values + 16 * second] = data[..., 0], data[..., 1]
        of_row = np.arange(16) % 8 * 4 + instruction * 2 + np.arange(16) // 8
        np.testing.assert_array_equal(tile.reshape(64, 16).T, rows[of_row, 0])


def test_a_weight_that_does_not_fit_says_why():
    rows = two_left(np.random.default_rng(2), 6, 20, (1, 1))[:, :, 0].swapaxes(1, 2)
    rows[4, 0, 8:11] = 1
    assert why_not_two_of_four(rows) == "1 of its 30 groups of four inputs have more than two weights"
    assert why_not_two_of_four(rows.astype(np.float32)) == "its weight is not int8"


def test_two_of_four_take_half_the_bytes_and_two_bits_more_a_weight_that_is_kept():
    rows = two_left(np.random.default_rng(3), 64, 256, (1, 1))[:, :, 0].swapaxes(1, 2)
    assert fragments(rows, True, 16).nbytes == 64 * 256 // 2 + 64 * 256 // 8
    assert fragments(rows, False, 16).nbytes == 64 * 256


@pytest.mark.parametrize(("words", "window"), [(192, ONE), (32, AROUND), (3, AROUND), (1, Window((7, 7), (2, 2)))])
def test_tiles_of_the_reduction_waste_little_and_fit(words, window):
    plane = Geometry(1, 56, 56, 3, 3)
    tile = mma_words(words, Places(window, plane, plane), is_sparse=True)
    steps = -(-words // tile) * -(-tile * len(window.taps()) // 16)
    assert steps <= -(-words * len(window.taps()) // 16) * 1.2
    far = Geometry(1, 90, 9000, 2, 2)
    assert mma_words(words, Places(Window((5, 5), padding=(2, 2)), far, far), is_sparse=True) is None


@pytest.mark.parametrize("is_sparse", [True, False])
def test_a_layer_takes_the_instruction_that_its_weight_allows(is_sparse):
    case = Case(4, (1, 90, 1, 70), 70, ONE, is_sparse)
    rows = case.weight.reshape(70, 90, 1).swapaxes(1, 2)
    work = on_tensor_cores(rows, case.work.source_rows, case.work.places, case.work.epilogue)
    constants = mma_constants(rows, work)
    assert work.is_sparse == is_sparse and ("metadata" in constants) == is_sparse
    case.arrays[1 : 1 + len(constants)], case.work = constants.values(), work
    check([case])
    far = Geometry(1, 90, 9000, 2, 2)
    places = Places(Window((5, 5), padding=(2, 2)), far, far)
    assert on_tensor_cores(np.ones((4, 25, 4), np.int8), 1, places, Epilogue()) is None


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", pytest.param("sm_100", marks=pytest.mark.slow)])
def test_nvcc_takes_it(architecture):
    try:
        nvcc = find_nvcc()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    works = [Case(1, (1, 256, 1, 128), 64, ONE, is_sparse).work for is_sparse in (True, False)]
    text = cuda_source({f"layer{i}": mma_layer(work, f"layer{i}") for i, work in enumerate(works)}).text
    assert nvcc.cubins(text, [architecture])[architecture].startswith(b"\x7fELF")
