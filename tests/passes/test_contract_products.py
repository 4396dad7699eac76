"""Which sums become fused multiply-adds, by what they compute: rounded once."""

import numpy as np
import pytest
from kernels import TARGETS
from lowering import NATIVE, Net
from tvm import relax
from tvm.script import tirx as T

from pumice.passes.contract_products import contract
from pumice.passes.pipeline import lower
from pumice.targets.build import build
from pumice.targets.plan import FIRST_INPUT, Plan, Step, View, aligned
from pumice.targets.target import Target
from pumice.verify import _Run

SIZE = 64


@T.prim_func(private=True)
def sums(x: T.Buffer((3, 64), "float32"), y: T.Buffer((5, 64), "float32")):
    for i in range(64):
        y[0, i] = x[0, i] * x[1, i] + x[2, i]
        y[1, i] = x[2, i] + x[0, i] * x[1, i]
        y[2, i] = x[0, i] * x[1, i] - x[2, i]
        y[3, i] = x[2, i] - x[0, i] * x[1, i]
        y[4, i] = x[0, i] * x[1, i] + x[2, i] * x[2, i]


@T.prim_func(private=True)
def others(n: T.Buffer((8,), "int32"), d: T.Buffer((8,), "float64"), y: T.Buffer((8,), "float32")):
    for i in range(8):
        n[i] = n[i] * n[i] + 1
        d[i] = d[i] * d[i] + T.float64(1)
        y[i] = (y[i] + T.float32(1)) * y[i]


def fused(a, b, c):
    """Exact products of small numbers in float64, rounded once with their sum."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def test_each_form_is_rounded_once():
    draw = np.random.default_rng(0)
    x = draw.standard_normal((3, SIZE)).astype(np.float32)
    steps = (Step("sums", (View(FIRST_INPUT), View(FIRST_INPUT + 1)), "", (5 * 4 * SIZE,)),)
    specs = (((3, SIZE), "float32"),), (((5, SIZE), "float32"),)
    plan = Plan({"sums": contract(sums)}, steps, aligned((0,), "uint8"), 0, *specs)
    run = _Run(plan, build(plan, NATIVE, for_tvm=False), [x])
    run.step(0)
    a, b, c = x
    expected = [fused(a, b, c), fused(a, b, c), fused(a, b, -c), fused(-a, b, c), fused(a, b, c * c)]
    np.testing.assert_array_equal(run.outputs[0], expected)


def test_integers_doubles_and_products_of_sums_stay():
    assert contract(others).script() == others.script()


@pytest.mark.parametrize("isa_name", ["avx2", "portable"])
def test_kernels_of_tvm_are_spelt_out_where_that_is_an_instruction(isa_name):
    net = Net(x=(2, 5))
    y = net.emit(relax.op.einsum((net.inputs["x"], net.inputs["x"]), "ij,kj->ik"))
    assert ("llvm.fma" in lower(net.module(y), Target.parse(TARGETS[isa_name])).script()) == (isa_name == "avx2")
