import numpy as np
import onnx
import pytest

pytest.importorskip("torch")

from bench.networks import BertBase, MiniLM, Perceptron
from bench.subjects import SUBJECTS


def test_samples_are_repeatable_and_cut_along_the_first_axis():
    for subject in SUBJECTS.values():
        feed = subject.feed(3)
        assert {len(array) for array in feed.values()} == {3}
        for name, array in subject.feed(3).items():
            np.testing.assert_array_equal(array, feed[name])


@pytest.mark.parametrize("name", ["demo", "mlp"])
def test_models_take_what_is_fed(name):
    subject = SUBJECTS[name]
    model = subject.model()
    onnx.checker.check_model(model)
    shapes = {e.name: tuple(d.dim_value for d in e.type.tensor_type.shape.dim) for e in model.graph.input}
    assert shapes == {key: array.shape for key, array in subject.feed(1).items()}


def test_the_networks_have_their_published_sizes():
    def weights(network):
        return sum(parameter.numel() for parameter in network.parameters())

    assert weights(MiniLM()) == 22_565_376
    assert weights(BertBase()) == 108_891_648  # without the pooler
    assert weights(Perceptron()) == 1_863_690
