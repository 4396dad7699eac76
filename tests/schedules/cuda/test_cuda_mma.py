"""Two of four weights on sparse tensor cores, against the definition; the instruction is emulated by its layouts."""

import numpy as np
import pytest
from cuda_kernels import emulate
from kernels import fold_zero_point, garbage, geometry_for, is_padding, packed_of, padded, unpacked
from reference import Residual as ReferenceResidual
from reference import conv_accumulate, conv_int8, layer_float32

from pumice.errors import MissingDependencyError
from pumice.schedules.cuda.mma import MmaLayer, mma_constants, mma_layer
from pumice.schedules.cuda.two_of_four import two_of_four, why_not_two_of_four
from pumice.schedules.epilogue import Epilogue, Residual
from pumice.schedules.geometry import Geometry, Window
from pumice.schedules.places import Places
from pumice.targets.cuda_source import cuda_source
from pumice.targets.nvcc import find_nvcc


def matrix(rng, n, k):
    """int8 ``[N, K]`` with two weights at most in every four, at random places; some rows are empty."""
    order = rng.random((n, -(-k // 4), 4)).argsort(axis=2)
    kept = order < rng.integers(0, 3, (n, -(-k // 4), 1))
    kept[rng.random(n) < 0.1] = False
    return (rng.integers(-128, 128, (n, k)) * kept.reshape(n, -1)[:, :k]).astype(np.int8)


class Case:
    def __init__(self, seed, x_shape, n, *, zx=3, zy=5, residual=False, output="uint8", padded_plane=False, **shape):
        rng = np.random.default_rng(seed)
        x, self.n = rng.integers(0, 256, x_shape).astype(np.uint8), n
        weight = matrix(rng, n, x_shape[1])
        bias = rng.integers(-3000, 3000, n).astype(np.int32)
        m = (rng.random(n) * 2e-3 / np.sqrt(x_shape[1])).astype(np.float32)
        out_shape = (x_shape[0], n, *x_shape[2:])
        target = geometry_for(x.shape, out_shape, Window((1, 1)))
        if padded_plane:
            target = Geometry(x_shape[0], *x_shape[2:], 1, 1)
        self.target, places = target, Places(Window((1, 1)), target, target)
        kernel = weight[:, :, None, None]
        if output == "float32":
            spec, other, epilogue = None, None, Epilogue("float32", None, 0, -np.inf, np.inf)
            acc = conv_accumulate(x, zx, kernel, bias)
            self.want, self.padding = layer_float32(acc, m.reshape(1, -1, 1, 1)), 0
        else:
            spec = Residual(float(np.float32(0.37)), 129) if residual else None
            other = rng.integers(0, 256, out_shape).astype(np.uint8) if residual else None
            epilogue = Epilogue("uint8", spec, zy)
            reference = ReferenceResidual(other, spec.zero_point, spec.multiplier) if residual else None
            self.want, self.padding = conv_int8(x, zx, kernel, bias, m, zy, reference), zy
        rows = weight[:, None, :]
        assert why_not_two_of_four(rows, places) is None
        packed = two_of_four(rows)
        source = packed_of(x, target, zx)
        self.work = MmaLayer(source.shape[0], packed.rows, packed.words, places, epilogue, **shape)
        self.arrays = [source, *mma_constants(packed).values()]
        self.arrays += [padded(fold_zero_point(weight, bias, zx), packed.rows), padded(m, packed.rows)]
        self.arrays += [] if other is None else [packed_of(other, target, 99)]
        self.arrays += [np.where(is_padding(target), 0, -1).astype(np.int32)] if target.is_padded else []
        shape = (packed.rows // 4, target.positions, 4) if output == "uint8" else (packed.rows, target.positions, 1)
        self.arrays.append(garbage(shape, output))


def check(cases):
    emulation = emulate({f"layer{i}": mma_layer(case.work, f"layer{i}") for i, case in enumerate(cases)})
    for i, case in enumerate(cases):
        for is_reversed in (False, True):
            arrays = [array.copy() for array in case.arrays]
            emulation.run(f"layer{i}", *arrays, is_reversed=is_reversed)
            np.testing.assert_array_equal(unpacked(arrays[-1], case.target, case.n), case.want)
            if case.target.is_padded:
                assert (arrays[-1][:, is_padding(case.target)] == case.padding).all()


def test_int8_equals_the_definition():
    rng = np.random.default_rng(1)
    random = [
        Case(
            seed, (1, int(rng.integers(1, 300)), 1, int(rng.integers(2, 150))), int(rng.integers(1, 100)),
            residual=seed % 2 == 0, warps=int(rng.integers(1, 5)), columns=int(rng.choice([1, 2, 4, 8])),
            steps=int(rng.integers(1, 4)),
        )
        for seed in range(10)
    ]  # fmt: skip
    maps = [Case(20, (2, 70, 7, 9), 40, padded_plane=True), Case(21, (1, 64, 5, 40), 32, residual=True)]
    check([*random, *maps, Case(22, (1, 130, 1, 33), 50, output="float32")])


def test_a_weight_that_does_not_fit_says_why():
    rng = np.random.default_rng(2)
    plane = Geometry.of_tokens(5)
    rows = matrix(rng, 6, 20)[:, None, :]
    rows[4, 0, 8:11] = 1
    here = Places(Window((1, 1)), plane, plane)
    assert why_not_two_of_four(rows, here) == (
        "1 of its groups of four inputs have more than two weights, the first at [4, 8]"
    )
    assert why_not_two_of_four(rows.astype(np.float32), here) == "its weight is not int8"
    strided = Places(Window((1, 1), (2, 2)), plane, plane)
    assert why_not_two_of_four(rows, strided) == "its kernel is not 1 x 1 with stride 1"


def test_it_takes_half_the_bytes_and_three_bits_a_weight_more():
    packed = two_of_four(matrix(np.random.default_rng(3), 64, 256)[:, None, :])
    assert packed.nbytes == 64 * 256 // 2 + 64 * 256 // 2 // 4


@pytest.mark.parametrize("architecture", ["sm_80", pytest.param("sm_100", marks=pytest.mark.slow)])
def test_nvcc_takes_it(architecture):
    try:
        nvcc = find_nvcc()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    text = cuda_source({"layer": mma_layer(Case(1, (1, 256, 1, 128), 64).work)}).text
    assert nvcc.cubins(text, [architecture])[architecture].startswith(b"\x7fELF")
