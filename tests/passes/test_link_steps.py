"""Linking: kernel calls in order on places in memory; what is returned lies in the caller's arrays."""

import numpy as np
import pytest
from lowering import NATIVE, Net, QuantizedNet
from tvm import relax

from pumice.errors import UnsupportedError
from pumice.module import with_weights
from pumice.passes.link_steps import link_steps
from pumice.passes.pipeline import lower
from pumice.targets.build import build
from pumice.targets.executor import build_executor
from pumice.targets.plan import FIRST_INPUT, WEIGHTS, WORKSPACE, View


def linked(net, *outputs):
    return link_steps(lower(net.module(*outputs), NATIVE))


def run(plan, **feeds):
    executor = build_executor(plan, NATIVE)
    for buffer, array in zip(executor.inputs, feeds.values(), strict=True):
        buffer[...] = array
    executor.run()
    return executor.outputs


def test_a_chain_alternates_in_the_workspace_and_ends_in_the_output():
    net = QuantizedNet(1, 8, 6, 6)
    y = net.start()
    for i in range(6):
        y = net.conv_layer(y, f"conv{i}", 8, padding=(1, 1, 1, 1))
    plan = linked(net, y.var)
    assert [step.layer for step in plan.steps if step.layer] == [f"conv{i}" for i in range(6)]
    assert plan.steps[0].arguments[0] == View(FIRST_INPUT)
    assert plan.steps[-1].arguments[-1] == View(FIRST_INPUT + 1)
    written = [step.arguments[-1] for step in plan.steps[:-1]]
    assert all(view.buffer == WORKSPACE for view in written)
    assert len({view.offset for view in written}) == 2
    np.testing.assert_array_equal(run(plan, x=net.feed)[0], y.real)


def test_a_value_that_is_read_late_keeps_its_place():
    net = Net(x=(4, 32))
    first = net.linear(net.inputs["x"], "first", 32)
    y = first
    for i in range(4):
        y = net.linear(y, f"middle{i}", 32)
    plan = linked(net, net.emit(relax.op.add(y, first)))
    outputs = run(plan, **net.feeds())
    x = net.feeds()["x"]
    values = {name: array for name, (_, array) in net.parameters.items()}
    first_value = x @ values["first.weight"] + values["first.bias"]
    expected = first_value
    for i in range(4):
        expected = expected @ values[f"middle{i}.weight"] + values[f"middle{i}.bias"]
    np.testing.assert_allclose(outputs[0], expected + first_value, rtol=1e-4, atol=1e-3)


def test_what_is_returned_twice_or_came_in_is_copied():
    net = Net(x=(3, 5))
    x, weight = net.inputs["x"], net.floats("w", 3, 5)
    y = net.emit(relax.op.nn.softmax(net.emit(relax.op.multiply(x, weight))))
    flat = net.emit(relax.op.reshape(y, (15,)))
    plan = linked(net, y, x, flat, weight, y)
    assert [step.kernel for step in plan.steps].count("copy_60_bytes") == 4
    outputs = run(plan, **net.feeds())
    one = outputs[0].copy()
    np.testing.assert_array_equal(outputs[1], net.feeds()["x"])
    np.testing.assert_array_equal(outputs[2], one.reshape(15))
    np.testing.assert_array_equal(outputs[3], net.parameters["w"][1])
    np.testing.assert_array_equal(outputs[4], one)
    product = net.feeds()["x"] * net.parameters["w"][1]
    expected = np.exp(product) / np.exp(product).sum(-1, keepdims=True)
    np.testing.assert_allclose(one, expected, rtol=1e-5)


def test_an_output_may_be_read_on():
    net = Net(x=(3, 5))
    y = net.linear(net.inputs["x"], "a", 5)
    z = net.linear(y, "b", 4)
    plan = linked(net, y, z)
    both = run(plan, **net.feeds())
    np.testing.assert_array_equal(both[0], run(linked(net, y), **net.feeds())[0])
    np.testing.assert_allclose(
        both[1], both[0] @ net.parameters["b.weight"][1] + net.parameters["b.bias"][1], rtol=1e-4, atol=1e-4
    )


def test_tuples_are_opened():
    net = Net(x=(2, 6))
    parts = net.emit(relax.op.split(net.inputs["x"], 3, axis=1))
    picked = [net.emit(relax.TupleGetItem(parts, i)) for i in (2, 0)]
    outputs = run(linked(net, *picked), **net.feeds())
    np.testing.assert_array_equal(outputs[0], net.feeds()["x"][:, 4:])
    np.testing.assert_array_equal(outputs[1], net.feeds()["x"][:, :2])


def test_equal_weights_are_stored_once_and_aligned():
    net = Net(x=(2, 5))
    same = np.arange(10, dtype=np.float32).reshape(2, 5)
    x = net.inputs["x"]
    for name in ("a", "b", "c"):
        value = same if name != "c" else same + 1
        x = net.emit(relax.op.multiply(net.emit(relax.op.tanh(x)), net.parameter(name, value)))
    plan = linked(net, x)
    views = {view for step in plan.steps for view in step.arguments if view.buffer == WEIGHTS}
    assert views == {View(WEIGHTS, 0), View(WEIGHTS, 64)}
    np.testing.assert_array_equal(plan.weights[64:104].view(np.float32).reshape(2, 5), same + 1)


def test_an_operator_that_nothing_lowered_is_refused_by_name():
    net = Net(x=(2, 5))
    mod = net.module(net.emit(relax.op.sin(net.inputs["x"])))
    with pytest.raises(UnsupportedError, match="net: operator 'sin' is left"):
        link_steps(with_weights(mod, {}))


def test_a_kernel_reads_its_arguments_from_their_first_elements():
    """TVM leaves offsets open in some that it writes as loops, for a caller that this plan has not."""
    net = Net(x=(3, 4))
    indices, values = relax.const(np.array([[0, 2, 1, 0]])), relax.const(np.ones((1, 4), np.float32))
    scattered = net.emit(relax.op.scatter_elements(net.inputs["x"], indices, values, axis=0))
    plan = link_steps(lower(net.module(scattered), NATIVE))
    for kernel in plan.kernels.values():
        assert all(int(parameter.elem_offset) == 0 for parameter in kernel.params)
    assert build(plan, NATIVE, for_tvm=False)


def test_two_plans_are_equal():
    net = QuantizedNet(1, 8, 6, 6)
    y = net.conv_layer(net.conv_layer(net.start(), "a", 8), "b", 8)
    one, two = linked(net, y.var), linked(net, y.var)
    assert one.steps == two.steps and one.workspace == two.workspace
    np.testing.assert_array_equal(one.weights, two.weights)
