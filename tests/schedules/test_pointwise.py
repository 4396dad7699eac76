"""Elementwise float kernels: every function against numpy, at the ends of its range too, and every kind of operand."""

import math

import numpy as np
import pytest
import reference
from kernels import ALL_ISAS, garbage, run_kernel

from pumice.schedules.functions import ACTIVATIONS, FUNCTIONS
from pumice.schedules.pointwise import Pointwise, pointwise
from pumice.targets.isa import isa

SPECIAL = [0.0, 1e-30, 1e-6, 0.0499, 0.0501, 0.3, 1.0, 3.7, 10.0, 87.0, 89.0, 200.0, 1e10, 3e38, np.inf]
ERF = np.vectorize(math.erf)

# In float64, by their definitions. Where a float32 ends up with inf * 0, so do these.
DEFINITIONS = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "clip": np.clip,
    "sqrt": np.sqrt,
    "negative": np.negative,
    "abs": np.abs,
    "nn.relu": lambda x: np.maximum(x, 0),
    "erf": ERF,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "hard_swish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "nn.silu": lambda x: x / (1 + np.exp(-x)),
    "nn.leakyrelu": lambda x, slope=0.01: np.where(x < 0, slope * x, x),
    "nn.gelu": lambda x: 0.5 * x * (1 + ERF(x / math.sqrt(2))),
    "nn.gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))),
}
BINARY = ("add", "subtract", "multiply", "divide", "maximum", "minimum")
UNARY = [name for name in FUNCTIONS if name not in (*BINARY, "clip")]


def run(isa_name, operator, rows, length, kinds, *tensors):
    work = Pointwise(operator, rows, length, kinds)
    arrays = [np.asarray(tensor, np.float32).ravel() for tensor in tensors]
    y = run_kernel(pointwise(work, isa(isa_name)), isa_name, *arrays, garbage((rows * length,), "float32"))
    return y.reshape(rows, length)


def define(operator, *operands):
    with np.errstate(all="ignore"):
        return DEFINITIONS[operator](*(np.asarray(operand, np.float64) for operand in operands)).astype(np.float32)


def agree(y, want, size):
    """Within a few units in the last place of the larger of result and operand, infinities and NaNs alike."""
    finite = np.isfinite(want)
    np.testing.assert_array_equal(y[~finite], want[~finite])
    y, want, size = y[finite], want[finite], size[finite]
    np.testing.assert_array_less(np.abs(y - want), 4e-7 * np.maximum(size, 1) + 3e-6 * np.abs(want))


def test_every_function_has_a_definition_here():
    assert set(FUNCTIONS) == set(DEFINITIONS)


@pytest.mark.parametrize("isa_name", ALL_ISAS)
@pytest.mark.parametrize("operator", UNARY)
def test_functions_of_one_tensor(isa_name, operator):
    rng = np.random.default_rng(1)
    special = np.concatenate([SPECIAL, np.negative(SPECIAL), [np.nan]])
    x = np.concatenate([special, rng.standard_normal(100) * 3]).astype(np.float32)  # 131: every vector has a tail
    y = run(isa_name, operator, 1, len(x), ("full",), x)[0]
    want = define(operator, x)
    # Products overflow on the way in float32 that do not in float64, and 0 * inf is NaN in one order only.
    tame = np.isnan(x) | (np.abs(x) < 1e20)
    if operator in ("nn.gelu", "nn.gelu_tanh", "nn.silu", "hard_swish"):
        wild = ~tame & np.isfinite(x)
        np.testing.assert_allclose(y[wild], np.maximum(x[wild], 0), rtol=1e-7, atol=2e-7)
        assert y[x == np.inf] == np.inf
    else:
        tame[:] = True
    if operator.startswith("nn.gelu"):
        np.testing.assert_allclose(y[tame], want[tame], rtol=1e-6, atol=5e-7)
    else:
        agree(y[tame], want[tame], np.ones(tame.sum()))


@pytest.mark.parametrize("isa_name", ALL_ISAS)
@pytest.mark.parametrize("operator", [name for name in ACTIVATIONS if "gelu" not in name])  # alone it is more exact
def test_activations_are_the_same_number_everywhere(isa_name, operator):
    x = np.concatenate([np.linspace(-100, 100, 4001), np.linspace(-6, 6, 4000), SPECIAL[:11]]).astype(np.float32)
    y = run(isa_name, operator, 1, len(x), ("full",), x)[0]
    np.testing.assert_array_equal(y, reference.FUNCTIONS[operator](x))


@pytest.mark.parametrize("operator", ["nn.gelu", "nn.gelu_tanh"])
def test_gelu_is_within_its_bound(operator):
    x = np.linspace(-20, 20, 400_001, dtype=np.float32)
    assert np.abs(reference.FUNCTIONS[operator](x) - define(operator, x)).max() < 5.6e-6


@pytest.mark.parametrize("isa_name", ALL_ISAS)
@pytest.mark.parametrize("operator", BINARY)
def test_functions_of_two_tensors(isa_name, operator):
    rng = np.random.default_rng(2)
    a = np.concatenate([[np.inf, -np.inf, 3e38, 0.0, 1.0], rng.standard_normal(36)]).astype(np.float32)
    b = np.concatenate([[1.0, 2.0, 3e38, 0.0, 0.0], rng.standard_normal(36)]).astype(np.float32)
    y = run(isa_name, operator, 1, len(a), ("full", "full"), a, b)[0]
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(y, DEFINITIONS[operator](a, b))


@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_clip(isa_name):
    x = np.array([-np.inf, -2, -1, 0, 0.5, 1, 2, np.inf, np.nan] * 5, np.float32)
    y = run(isa_name, "clip", 1, len(x), ("full", -1.0, 1.0), x)[0]
    np.testing.assert_array_equal(y, np.clip(x, -1, 1))
    unbounded = run(isa_name, "clip", 1, len(x), ("full", 0.0, float("inf")), x)[0]
    np.testing.assert_array_equal(unbounded, np.clip(x, 0, np.inf))


@pytest.mark.parametrize("isa_name", ALL_ISAS)
@pytest.mark.parametrize("operator", ["maximum", "minimum"])
def test_a_maximum_with_nan_is_nan(isa_name, operator):
    a, b = np.array([np.nan, 1, 2, np.nan] * 5, np.float32), np.array([1, np.nan, 3, np.nan] * 5, np.float32)
    y = run(isa_name, operator, 1, len(a), ("full", "full"), a, b)[0]
    np.testing.assert_array_equal(y, DEFINITIONS[operator](a, b))


@pytest.mark.parametrize("isa_name", ALL_ISAS)
@pytest.mark.parametrize("length", [1, 3, 16, 37])
def test_operands_that_broadcast(isa_name, length):
    rng = np.random.default_rng(3)
    x, row = rng.standard_normal((5, length)).astype(np.float32), rng.standard_normal(length).astype(np.float32)
    np.testing.assert_array_equal(run(isa_name, "subtract", 5, length, ("full", "row"), x, row), x - row)
    np.testing.assert_array_equal(run(isa_name, "subtract", 5, length, ("row", "full"), row, x), row - x)
    np.testing.assert_array_equal(run(isa_name, "divide", 5, length, (2.0, "full"), x), np.float32(2) / x)
    np.testing.assert_array_equal(run(isa_name, "add", 5, length, ("full", "full"), x, x), x + x)
