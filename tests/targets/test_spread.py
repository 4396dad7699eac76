"""CPU kernels on a GPU's threads, emulated: the bits that LLVM's code for them gives, in any order of threads."""

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from gpu import needs_gxx
from kernels import garbage
from tvm import tirx

from pumice.schedules.attention import Attention, Bias, Heads, Requantize, attention
from pumice.schedules.copy import copy
from pumice.schedules.elementwise import Add, add, lookup
from pumice.schedules.functions import FUNCTIONS
from pumice.schedules.gather import Gather, gather
from pumice.schedules.geometry import Geometry, Window
from pumice.schedules.layout import Packing, Planes, pack, planes, quantize_packed, unpack
from pumice.schedules.matmul import Matmul, matmul
from pumice.schedules.normalization import LayerNorm, Softmax, layer_norm, softmax
from pumice.schedules.packed_norm import PackedNorm, packed_norm
from pumice.schedules.pointwise import Pointwise, pointwise
from pumice.schedules.pooling import GlobalAverage, Pooling, global_average, pooling
from pumice.targets.cuda_emulation import Emulation
from pumice.targets.cuda_source import cuda_source
from pumice.targets.isa import isa
from pumice.targets.spread import THREADS, spread
from pumice.targets.target import Target

pytestmark = needs_gxx

CUDA = isa("cuda")
FUSED = ("matmul", "dot_product", "attention")  # float products that LLVM adds with one rounding where it can
PADDED, PLAIN, TOKENS = Geometry(2, 5, 7, 1, 1), Geometry(1, 9, 11), Geometry.of_tokens(19)
STRIDED = Window((3, 3), (2, 2), (1, 1), (1, 1))
HEADS = [Heads(72, TOKENS.positions, 19, 24 * i, 8) for i in range(3)]
OPERANDS = {"add": 2, "subtract": 2, "multiply": 2, "divide": 2, "maximum": 2, "minimum": 2, "clip": 3}


def kernels() -> dict[str, tirx.PrimFunc]:
    """Every kernel that is no layer, small, with what is odd about each."""
    made: dict[str, tuple[Callable, object]] = {
        "pack_maps": (pack, Packing(6, PADDED, False, 0.1, 3)),
        "pack_floats": (pack, Packing(6, PADDED, False)),
        "pack_tokens": (pack, Packing(8, TOKENS, True, 0.1, 3)),
        "pack_odd_tokens": (pack, Packing(7, TOKENS, True, 0.1, 3)),
        "pack_float_tokens": (pack, Packing(7, TOKENS, True)),
        "pack_vector": (pack, Packing(9, Geometry.of_tokens(1), True, 0.1, 3)),
        "unpack_maps": (unpack, Packing(6, PADDED, False, 0.1, 3)),
        "unpack_tokens": (unpack, Packing(8, TOKENS, True, 0.1, 3)),
        "quantize": (quantize_packed, Packing(8, PADDED, False, 0.1, 3)),
        "planes": (
            planes,
            Planes(2, PLAIN, Geometry(1, 5, 6, 1, 1), Window((3, 3), (2, 2), (1, 1), (1, 1)), "uint8", 9),
        ),
        "float_planes": (planes, Planes(3, PLAIN, Geometry(1, 9, 11, 1, 2), Window((1, 1)), "float32", 0.5)),
        "maximum": (pooling, Pooling("maximum", "uint8", 2, 1, PADDED, PADDED, (0, 1, 8))),
        "average": (pooling, Pooling("average", "uint8", 2, 1, PADDED, PADDED, (0, 1), 3, 0.3, 5)),
        "float_maximum": (pooling, Pooling("maximum", "float32", 2, 1, PLAIN, PLAIN, (0, 1))),
        "mean": (global_average, GlobalAverage("uint8", 3, PADDED, Geometry(2, 1, 1), 3, 0.01, 4)),
        "float_mean": (global_average, GlobalAverage("float32", 3, PLAIN, Geometry(1, 1, 1), 0, 0.01)),
        "sum": (add, Add(1050, 3, 0.5, 4, 0.25, 6)),
        "lookup": (lookup, 50),
        "gather": (gather, Gather(10, 8, 5, "int64")),
        "matmul": (matmul, Matmul(2, 5, 6, 7)),
        "softmax": (softmax, Softmax(5, 37)),
        "layer_norm": (layer_norm, LayerNorm(5, 37, 1e-5)),
        "packed_norm": (packed_norm, PackedNorm(30, TOKENS.positions, 19, 1e-5, True, True, 3.0, 7)),
        "attention": (attention, Attention(1, 3, 8, 8, 0.3, *HEADS)),
        "masked_attention": (
            attention,
            Attention(1, 3, 8, 8, 0.3, *HEADS, Bias(20, 16, 1, 1, 1), True, Requantize(20.0, 99)),
        ),
    }
    made |= {  # one row, one tile: no loop stands around the buffers
        "dot_product": (matmul, Matmul(1, 1, 1, 7)),
        "softmax_of_one": (softmax, Softmax(1, 37)),
        "layer_norm_of_one": (layer_norm, LayerNorm(1, 37, 1e-5)),
        "packed_norm_of_one": (packed_norm, PackedNorm(30, 1, 1, 1e-5, True, True, 3.0, 7)),
        "mean_of_one": (global_average, GlobalAverage("uint8", 1, PLAIN, Geometry(1, 1, 1), 3, 0.01, 4)),
        "float_mean_of_one": (global_average, GlobalAverage("float32", 1, PLAIN, Geometry(1, 1, 1), 0, 0.01)),
        "attention_of_one": (attention, Attention(1, 1, 1, 8, 0.3, *(Heads(24, 1, 1, 8 * i, 8) for i in range(3)))),
    }
    found = {name: make(work, CUDA) for name, (make, work) in made.items()}
    found["copy"] = copy(1000)
    for name in FUNCTIONS:
        kinds = ("full", "row", 0.5)[: OPERANDS.get(name, 1)]
        found["function_" + name.replace(".", "_")] = pointwise(Pointwise(name, 6, 50, kinds), CUDA)
    return found


KERNELS = kernels()


@pytest.fixture(scope="module")
def emulation():
    return Emulation(cuda_source({name: spread(kernel) for name, kernel in KERNELS.items()}))


@pytest.fixture(scope="module")
def compiled():
    functions = {name: kernel.with_attr("global_symbol", name) for name, kernel in KERNELS.items()}
    return tvm.compile(tvm.IRModule(functions), target=Target.parse("native").tvm)


def arguments(name: str) -> tuple[list[np.ndarray], int]:
    """Random arguments of a kernel, its outputs full of garbage, and how many outputs there are."""
    draw, found = np.random.default_rng(len(name)), []
    for parameter in KERNELS[name].params:
        shape, dtype = tuple(int(size) for size in parameter.shape), str(parameter.dtype)
        is_float = dtype == "float32"
        array = draw.standard_normal(shape) * 3 if is_float else draw.integers(0, 9 if dtype == "int64" else 256, shape)
        found.append(array.astype(dtype))
    outputs = 2 if name.startswith("packed_norm") else 1
    for i in range(len(found) - outputs, len(found)):
        found[i] = garbage(found[i].shape, str(found[i].dtype))
    return found, outputs


@pytest.mark.parametrize("name", KERNELS)
def test_threads_give_what_loops_give(emulation, compiled, name):
    given, outputs = arguments(name)
    expected = [tvm.runtime.tensor(array) for array in given]
    compiled[name](*expected)
    for is_reversed in (False, True):
        arrays = [array.copy() for array in given]
        emulation.run(name, *arrays, is_reversed=is_reversed)
        for array, other in zip(arrays[-outputs:], expected[-outputs:], strict=True):
            if name.startswith(FUSED):
                np.testing.assert_allclose(array, other.numpy(), 1e-5, 1e-5)
            else:
                np.testing.assert_array_equal(array, other.numpy())


def test_a_thread_for_each_word_and_neighbours_side_by_side(emulation):
    launches = emulation.source.launches
    (only,) = launches["function_sqrt"]
    assert only.grid[0] * only.block[0] == 2 * THREADS >= 6 * 50
    fill, write = launches["pack_maps"]
    assert (fill.arguments, write.arguments) == ((1,), (1, 0))
    assert write.block == (160, 1, 1) and write.grid == (1, 1, 1)


def test_a_sum_is_not_torn_apart():
    """A loop that adds up into a buffer around it stays in one thread."""
    text = cuda_source({"mean": spread(KERNELS["mean"])}).text
    assert "for (int" in text.split("mean_kernel", 2)[2]


def test_what_shares_a_buffer_is_not_torn_apart():
    """Without a loop around it, as of one row, one thread does it all; else each thread has a row."""
    for name, rows in (("softmax_of_one", 1), ("softmax", 5)):
        source = cuda_source({name: spread(KERNELS[name])})
        (launch,) = source.launches[name]
        assert (launch.grid, launch.block) == ((1, 1, 1), (32, 1, 1))
        assert f"< {rows})" in source.text
