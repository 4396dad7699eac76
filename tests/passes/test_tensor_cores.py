"""Which layers tensor cores compute, from sm_80 on: those that take less time there than as lists, padding included."""

import numpy as np
import pytest
from lowering import QuantizedNet

from pumice.module import layers_of
from pumice.passes.pipeline import LowerOptions, lower
from pumice.targets.target import Target


def two_of_four(net: QuantizedNet, name: str) -> None:
    """Leave two of every four neighbouring inputs of a layer's weight."""
    var, weight = net.parameters[f"{name}.weight"]
    kept = weight.copy()
    kept[:, 0::4] = kept[:, 3::4] = 0
    net.parameters[f"{name}.weight"] = var, kept


@pytest.fixture(scope="module")
def module():
    net = QuantizedNet(1, 32, 9, 9)
    x = net.start()
    for name, density in (("dense", 1.0), ("halved", 1.0), ("few", 0.05), ("some", 0.5)):
        x = net.conv_layer(x, name, 64, padding=(1, 1, 1, 1), density=density)
    x = net.conv_layer(x, "narrow", 4, kernel=1)
    x = net.conv_layer(x, "none", 8, kernel=1, density=0.0)
    two_of_four(net, "halved")
    return net.module(x.var)


@pytest.mark.parametrize("target", ["sm_80", "sm_87", "sm_100"])
def test_lists_are_kept_where_they_have_less_to_do(module, target):
    layers = layers_of(lower(module, Target.parse(target), LowerOptions()))
    kernels = {name: layer.kernel for name, layer in layers.items()}
    assert kernels == {
        "dense": "dense int8 tensor cores",
        "halved": "2:4 int8 tensor cores",
        "few": "sparse 1x4 int8 cuda",
        "some": "dense int8 tensor cores",
        "narrow": "dense int8 cuda",
        "none": "sparse 1x4 int8 cuda",
    }
    assert "tensor cores multiply 4 times" in layers["some"].reason
    assert "none with more than two weights, and tensor cores multiply 8 times" in layers["halved"].reason
    assert "; tensor cores would take 2." in layers["narrow"].reason  # 4 of 32 rows
    assert "; tensor cores would take" in layers["few"].reason


@pytest.mark.parametrize("target", ["sm_75", "cuda"])
def test_code_for_older_gpus_does_without(module, target):
    layers = layers_of(lower(module, Target.parse(target), LowerOptions()))
    assert all("tensor" not in layer.kernel for layer in layers.values())
    assert np.all([layer.dtype == "int8" for layer in layers.values()])
    assert all("from sm_80 on, and the target includes sm_75" in layer.reason for layer in layers.values())
