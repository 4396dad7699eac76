"""Fake quantization: the numbers that int8 computes, and gradients that pass."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from running import run_module
from torch import nn

from pumice.errors import UsageError
from pumice.frontend import read_model
from pumice.frontend.torch import add_fake_quantization, export, remove_fake_quantization
from pumice.frontend.torch_int8 import RoundInput, RoundWeight
from pumice.module import weights_of
from pumice.passes import Calibrate, Quantize, SimplifyModel


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 4))


IMAGES = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 2, 2), (3, 4, 5)])
def test_weights_round_by_channel(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    weight[0] = 0
    weight[1, 0] = 0
    rows = weight.numpy().reshape(shape[0], -1)
    scale = np.abs(rows).max(1, keepdims=True) / np.float32(127)
    scale[0] = 1
    wanted = np.rint(rows / scale) * scale
    rounded = RoundWeight()(weight)
    np.testing.assert_array_equal(rounded.numpy().reshape(rows.shape), wanted)
    assert (rounded[0] == 0).all() and (rounded[1, 0] == 0).all()
    assert (RoundWeight()(rounded) - rounded).abs().max() < 1e-6  # what is rounded stays


def test_inputs_round_over_their_range() -> None:
    quantizer = RoundInput().train()
    quantizer(torch.tensor([0.5, 2.0]))
    assert quantizer.range.tolist() == [0.5, 2.0]
    quantizer(torch.tensor([-1.0, 3.0]))
    low, high = 0.5 - 0.01 * 1.5, 2.0 + 0.01
    assert quantizer.range.tolist() == pytest.approx([low, high])
    quantizer.eval()
    data = torch.tensor([-1.0, 0.0, 0.3, 1.0, 2.005, 9.0], requires_grad=True)
    rounded = quantizer(data)
    scale = high / 255  # widened to hold 0
    wanted = np.clip(np.rint(data.detach().numpy() / scale), 0, 255) * scale
    np.testing.assert_allclose(rounded.detach().numpy(), wanted, rtol=1e-6)
    rounded.sum().backward()
    assert data.grad.tolist() == [0, 1, 1, 1, 1, 0]
    assert quantizer.range.tolist() == pytest.approx([low, high])


def test_a_range_below_zero_has_its_zero_point() -> None:
    quantizer = RoundInput().train()
    data = torch.linspace(-3, 1, 40)
    steps = np.rint(data.numpy() / (4 / 255)) * (4 / 255)
    np.testing.assert_allclose(quantizer(data).numpy(), steps, atol=1e-6)
    assert RoundInput().train()(torch.zeros(3)).tolist() == [0, 0, 0]


def test_training_sees_what_quantize_computes(tmp_path: Path) -> None:
    model = net()
    plain = copy.deepcopy(model)
    add_fake_quantization(model)
    model.train()(IMAGES)
    with torch.no_grad():
        wanted = model.eval()(IMAGES).numpy()
    path = export(plain, (IMAGES,), tmp_path / "net.onnx", input_names=["image"])
    road = [SimplifyModel(), Calibrate({"image": IMAGES.numpy()}, "minmax"), Quantize()]
    mod = tvm.transform.Sequential(road)(read_model(path))
    for name in ("0.weight", "3.weight", "5.weight"):
        rows = weights_of(mod)[name]
        assert rows.dtype == np.int8
    got = run_module(mod, {"image": IMAGES.numpy()})[0]
    with torch.no_grad():
        exact = plain(IMAGES).numpy()
    # All of the noise but what single sums do that are rounded the other way.
    assert np.square(got - wanted).sum() < 0.1 * np.square(exact - wanted).sum()


def test_gradients_pass_to_weights_and_inputs() -> None:
    model = net()
    exact = copy.deepcopy(model)
    add_fake_quantization(model)
    for each in (model, exact):
        each(IMAGES).square().mean().backward()
    for layer, other in ((model[0], exact[0]), (model[3], exact[3]), (model[5], exact[5])):
        gradient, wanted = layer.parametrizations["weight"].original.grad, other.weight.grad
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), wanted.flatten(), dim=0) > 0.99


def test_adding_and_removing_leaves_the_plain_model() -> None:
    model = net()
    plain = copy.deepcopy(model)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    assert add_fake_quantization(model, keep=["0"]) == ["3", "5"]
    copied = copy.deepcopy(model)
    model(IMAGES).mean().backward()
    optimiser.step()  # knows the parameters from before
    assert not torch.equal(model[3].weight, plain[3].weight)
    assert copied[3].input_quantizer.batches == 0 and model[3].input_quantizer.batches == 1
    trained = model[3].parametrizations["weight"].original.detach().clone()
    remove_fake_quantization(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [type(part) for part in model.modules()] == [type(part) for part in plain.modules()]
    assert not any(part._forward_pre_hooks for part in model.modules())
    assert torch.equal(model[3].weight, trained)
    copied(IMAGES)  # goes on as it was
    assert copied[3].input_quantizer.batches == 1
    remove_fake_quantization(copied)
    assert torch.equal(copied(IMAGES), plain(IMAGES))


def test_its_state_resumes() -> None:
    model, other = net(), net()
    for each in (model, other):
        add_fake_quantization(each)
    model(IMAGES)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(IMAGES), model.eval()(IMAGES))


def test_what_cannot_be_done_is_said() -> None:
    model = net()
    with pytest.raises(UsageError, match="keep='conv' names no layer of Sequential; it has 0, 3, 5"):
        add_fake_quantization(model, keep=["conv"])
    add_fake_quantization(model)
    with pytest.raises(UsageError, match="the layer 0 has fake quantization already"):
        add_fake_quantization(model)
