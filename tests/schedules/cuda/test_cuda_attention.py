"""Attention and norms on a GPU, emulated: the numbers of the CPU's kernels, for any order of threads."""

import numpy as np
import pytest
import tvm
from gpu import needs_gxx
from kernels import garbage

from pumice.schedules.attention import Attention, Bias, Heads, Requantize, attention
from pumice.schedules.cuda.attention import QUERIES, cuda_attention, fits
from pumice.schedules.cuda.packed_norm import cuda_packed_norm
from pumice.schedules.geometry import Geometry
from pumice.schedules.packed_norm import PackedNorm, packed_norm
from pumice.targets.cuda_emulation import Emulation
from pumice.targets.cuda_source import cuda_source
from pumice.targets.isa import isa
from pumice.targets.target import Target

pytestmark = needs_gxx

CUDA = isa("cuda")


def heads(count: int, size: int, length: int, batch: int = 1, first: int = 0, rows: int = 0) -> Heads:
    """``count`` heads of ``size`` channels, side by side from row ``first`` on."""
    positions = Geometry.of_tokens(length * batch).positions
    return Heads(rows or -(-count * size // 4) * 4, positions, length, first, size)


ATTENTION = {
    "one_tensor": Attention(1, 3, 8, 8, 0.3, *(heads(3, 8, 19, 1, 24 * i, 72) for i in range(3))),
    "masked_bytes": Attention(
        2,
        3,
        8,
        8,
        0.3,
        *(heads(3, 8, 19, 2, 24 * i, 72) for i in range(3)),
        Bias(20, 48, 1, 1, 1),
        True,
        Requantize(20.0, 99),
    ),
    "two_blocks_of_keys": Attention(
        1, 2, 7, 6, 0.3, heads(2, 7, 300), heads(2, 7, 300), heads(2, 6, 300), Bias(300, 608, 1, 2, 300)
    ),
    "three_blocks": Attention(1, 1, 64, 40, 0.1, heads(1, 64, 33), heads(1, 64, 700), heads(1, 40, 700)),
}
NORMS = {
    "both": PackedNorm(30, 32, 19, 1e-5, True, True, 3.0, 7),
    "floats": PackedNorm(8, 16, 16, 1e-5, True, True),
    "bytes": PackedNorm(68, 16, 1, 1e-5, False, False, 3.0, 7),
}


@pytest.fixture(scope="module")
def emulation():
    made = {name: cuda_attention(work, CUDA, name) for name, work in ATTENTION.items()}
    made |= {name: cuda_packed_norm(work, CUDA, name) for name, work in NORMS.items()}
    return Emulation(cuda_source(made))


def expected(kernel, arguments: list[np.ndarray]) -> list[np.ndarray]:
    library = tvm.compile(
        tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")}), target=Target.parse("native").tvm
    )
    tensors = [tvm.runtime.tensor(array) for array in arguments]
    library["kernel"](*tensors)
    return [tensor.numpy() for tensor in tensors]


def random_arguments(kernel, outputs: int) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = [(tuple(int(size) for size in p.shape), str(p.dtype)) for p in kernel.params]
    inputs = [draw.standard_normal(shape).astype(dtype) for shape, dtype in shapes[: len(shapes) - outputs]]
    return [*inputs, *(garbage(*spec) for spec in shapes[len(shapes) - outputs :])]


@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_gives_what_the_cpu_gives(emulation, name, is_reversed):
    kernel = attention(ATTENTION[name], CUDA)
    arrays = random_arguments(kernel, 1)
    if name == "masked_bytes":
        arrays[3][5:9] = -np.inf
    if name == "two_blocks_of_keys":
        arrays[3][:, 3], arrays[3][7, 5] = -np.inf, np.nan
    other = expected(kernel, arrays)[-1]
    emulation.run(name, *arrays, is_reversed=is_reversed)
    if ATTENTION[name].requantize:
        assert np.abs(arrays[-1].astype(int) - other).max() <= 1
    else:  # a CPU may round the product of a sum by itself
        np.testing.assert_allclose(arrays[-1], other, 1e-5, 1e-6)


@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_norms_give_the_same_bits(emulation, name, is_reversed):
    work = NORMS[name]
    kernel, outputs = packed_norm(work, CUDA), work.writes_float + (work.multiplier is not None)
    arrays = random_arguments(kernel, outputs)
    others = expected(kernel, arrays)
    emulation.run(name, *arrays, is_reversed=is_reversed)
    for array, other in zip(arrays[-outputs:], others[-outputs:], strict=True):
        np.testing.assert_array_equal(array, other)


def test_a_tile_of_queries_is_a_block(emulation):
    (launch,) = emulation.source.launches["three_blocks"]
    assert launch.grid == (-(-33 // QUERIES), 1, 1)


def test_heads_too_large_for_shared_memory_are_left_to_the_spread_kernel():
    large = heads(1, 1024, 5)
    assert not fits(Attention(1, 1, 1024, 1024, 1.0, large, large, large))
