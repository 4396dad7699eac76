"""The whole lowering: what is left is TIR, whatever the target, and the numbers are the same on each."""

import numpy as np
import pytest
from kernels import ALL_ISAS, TARGETS
from lowering import NATIVE, Net, QuantizedNet, run_lowered, run_net
from tvm import relax, tirx

from pumice.module import inputs_of, layers_of, output_names_of, source_of, weights_of
from pumice.passes.pipeline import LowerOptions, lower
from pumice.targets.target import Target

SAME = (1, 1, 1, 1)


def network():
    net = QuantizedNet(1, 6, 7, 9)
    y = net.conv_layer(net.start(), "a", 12, padding=SAME, relu=True)
    z = net.conv_layer(y, "b", 12, padding=SAME, density=0.2, residual=y)
    w = net.conv_layer(z, "c", 5, stride=(2, 2), padding=SAME)
    return net, w


@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_every_target_gives_the_definition(isa_name):
    net, value = network()
    outputs, lowered = run_net(net, value.var, target=Target.parse(TARGETS[isa_name]))
    np.testing.assert_array_equal(outputs[0], value.real)
    assert all(isa_name in record.kernel for record in layers_of(lowered).values())


def test_every_operator_is_a_function_afterwards():
    net, value = network()
    mod = net.module(value.var, net.emit(relax.op.nn.softmax(net.emit(relax.op.tanh(net.inputs["x"])))))
    lowered = lower(mod, NATIVE)
    values = [binding.value for block in lowered["main"].body.blocks for binding in block.bindings]
    operators = {str(value.op.name) for value in values if isinstance(value, relax.Call)}
    assert operators == {"relax.call_tir", "relax.reshape"}
    others = [f for name, f in lowered.functions_items() if name.name_hint != "main"]
    assert others and all(isinstance(function, tirx.PrimFunc) for function in others)
    assert [var.name for var in inputs_of(lowered)] == ["x"]
    assert output_names_of(lowered) == ["y0", "y1"] and source_of(lowered) == "net"


def test_lowering_leaves_its_input_as_it_was():
    net, value = network()
    mod = net.module(value.var)
    before = mod.script()
    weights = {name: array.copy() for name, array in weights_of(mod).items()}
    lower(mod, NATIVE, LowerOptions(threads=2))
    assert mod.script() == before and not layers_of(mod)
    for name, array in weights_of(mod).items():
        np.testing.assert_array_equal(array, weights[name])


def test_two_lowerings_are_equal():
    net, value = network()
    mod = net.module(value.var)
    one, two = lower(mod, NATIVE), lower(mod, NATIVE)
    assert one.script() == two.script()
    for name, array in weights_of(one).items():
        np.testing.assert_array_equal(array, weights_of(two)[name])


def test_a_module_without_layers_is_only_legalized():
    net = Net(x=(2, 5))
    y = net.emit(relax.op.add(net.emit(relax.op.nn.relu(net.inputs["x"])), net.inputs["x"]))
    outputs, lowered = run_lowered(net.module(y), net.feeds())
    x = net.feeds()["x"]
    np.testing.assert_array_equal(outputs[0], np.maximum(x, 0) + x)
    assert layers_of(lowered) == {}


def test_an_input_may_be_an_output():
    net = Net(x=(2, 5))
    outputs, _ = run_lowered(net.module(net.inputs["x"], net.linear(net.inputs["x"], "a", 3)), net.feeds())
    np.testing.assert_array_equal(outputs[0], net.feeds()["x"])
