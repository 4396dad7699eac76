"""What TVM makes of operators without a kernel, on a GPU's threads: scratch for what goes between its parts."""

import numpy as np
import pytest
from gpu import BESIDE_THIS, FakeDriver, emulated_library, needs_gxx
from lowering import Net
from tvm import relax

from pumice.errors import UnsupportedError
from pumice.loader import load
from pumice.passes.link_steps import link_steps
from pumice.passes.pipeline import LowerOptions, lower
from pumice.targets.cuda_source import cuda_source
from pumice.targets.gpu_plan import gpu_plan
from pumice.targets.plan import SCRATCH

pytestmark = needs_gxx


@pytest.fixture(scope="module")
def module():
    net = Net(x=(2, 5, 7))
    x = net.inputs["x"]
    spread = net.emit(relax.op.variance(x, [2]))
    turned = net.emit(relax.op.permute_dims(x, [0, 2, 1]))
    return net.module(spread, turned, net.emit(relax.op.nn.softmax(x, axis=1)), x)


def test_parts_hand_on_their_results_in_scratch(module):
    plan = link_steps(lower(module, BESIDE_THIS, LowerOptions()))
    bound, scratch = gpu_plan(plan, BESIDE_THIS)
    assert scratch > 0 and scratch % 64 == 0
    for before, after in zip(plan.steps, bound.steps, strict=True):
        assert after.results == before.results
        more = [view for view in after.arguments if view not in before.arguments]
        assert all(view.buffer == SCRATCH and view.offset < scratch for view in more)
        assert len(bound.kernels[after.kernel].params) == len(after.arguments)


def test_a_library_of_such_operators_runs(module, tmp_path):
    driver = FakeDriver(tmp_path)
    emulated = emulated_library(module, tmp_path / "model.so")
    x = np.random.default_rng(0).standard_normal((2, 5, 7)).astype(np.float32)
    with load(emulated.path) as model:
        variance, turned, softmax, same = model(x).values()
    powers = np.exp(x - x.max(axis=1, keepdims=True))
    np.testing.assert_allclose(variance, x.var(axis=2), 1e-5)
    np.testing.assert_array_equal(turned, x.transpose(0, 2, 1))
    np.testing.assert_allclose(softmax, powers / powers.sum(axis=1, keepdims=True), 1e-5)
    np.testing.assert_array_equal(same, x)
    assert driver.live == 0


def test_what_starts_where_tvm_leaves_open_starts_at_the_first_element(tmp_path):
    """TVM has kernels for GPUs of its own for this operator, on buffers with an offset for whoever calls them."""
    driver = FakeDriver(tmp_path)
    net = Net(x=(3, 4))
    places, values = np.array([[0, 2, 1, 0]]), np.arange(4, dtype=np.float32).reshape(1, 4)
    operands = relax.const(places), relax.const(values)
    scattered = net.emit(relax.op.scatter_elements(net.inputs["x"], *operands, axis=0))
    emulated = emulated_library(net.module(scattered), tmp_path / "model.so")
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    with load(emulated.path) as model:
        (found,) = model(x).values()
    np.put_along_axis(x, places, values, 0)
    np.testing.assert_array_equal(found, x)
    assert driver.live == 0


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("median", lambda x: relax.op.median(x, [1])),
        ("searchsorted", lambda x: relax.op.bucketize(x, relax.const(np.arange(3, dtype=np.float32)))),
    ],
)
def test_an_operator_that_no_thread_can_run_is_refused_by_name(name, operator):
    net = Net(x=(2, 7))
    mod = net.module(net.emit(operator(net.inputs["x"])))
    plan = link_steps(lower(mod, BESIDE_THIS, LowerOptions()))
    with pytest.raises(UnsupportedError, match=f"'{name}'"):
        cuda_source(gpu_plan(plan, BESIDE_THIS)[0].kernels)
