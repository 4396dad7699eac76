import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from bench.pruning import prune_blocks

DRAW = np.random.default_rng(5)


def model(**weights):
    """A convolution each: ``first`` has one input channel, ``grouped`` two groups; and a product with ``matrix``."""
    nodes = []
    x = "x"
    for name in weights:
        if name == "matrix":
            nodes.append(helper.make_node("MatMul", [x, name], [f"{name}_y"]))
        else:
            nodes.append(helper.make_node("Conv", [x, name], [f"{name}_y"], group=2 if name == "grouped" else 1))
        x = f"{name}_y"
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph)


def weights_of(pruned):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in pruned.graph.initializer}


def normal(*shape):
    return DRAW.standard_normal(shape).astype(np.float32)


def test_the_smallest_blocks_go_and_the_norm_stays():
    conv, matrix = normal(6, 8, 3, 3), normal(8, 6)
    found = weights_of(prune_blocks(model(conv=conv, matrix=matrix), 0.75))
    for before, after, axis in ((conv, found["conv"], 1), (matrix, found["matrix"], 0)):
        blocks, left = (np.moveaxis(w, axis, -1).reshape(-1, 4) for w in (before, after))
        gone = ~left.any(1)
        assert gone.sum() == round(0.75 * len(blocks))
        size = np.abs(blocks).sum(1)
        assert size[gone].max() < size[~gone].min()
        assert np.linalg.norm(left) == pytest.approx(np.linalg.norm(blocks), rel=1e-5)
        scale = left[~gone] / blocks[~gone]
        np.testing.assert_allclose(scale, scale[0, 0], rtol=1e-5)


def test_what_has_no_blocks_is_left_alone():
    given = {"first": normal(8, 1, 3, 3), "grouped": normal(8, 4, 1, 1)}
    found = weights_of(prune_blocks(model(**given), 0.9))
    for name, weight in given.items():
        np.testing.assert_array_equal(found[name], weight)


def test_pointwise_only():
    given = {"wide": normal(8, 8, 3, 3), "narrow": normal(8, 8, 1, 1), "matrix": normal(8, 8)}
    found = weights_of(prune_blocks(model(**given), 0.5, pointwise_only=True))
    np.testing.assert_array_equal(found["wide"], given["wide"])
    assert all((found[name] == 0).mean() == 0.5 for name in ("narrow", "matrix"))


def test_the_model_that_was_given_stays_as_it_was():
    given = model(conv=normal(8, 8, 1, 1))
    before = given.SerializeToString(deterministic=True)
    prune_blocks(given, 0.9)
    assert given.SerializeToString(deterministic=True) == before
