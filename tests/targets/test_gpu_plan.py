"""What TVM makes of operators without a kernel, on a GPU's threads: scratch for what goes between its parts."""

import numpy as np
import pytest
from gpu import BESIDE_THIS, FakeDriver, emulated_library, needs_gxx
from lowering import Net
from tvm import relax

from pumice.loader import load
from pumice.passes.link_steps import link_steps
from pumice.passes.pipeline import LowerOptions, lower
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
