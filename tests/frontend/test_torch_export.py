"""What training leaves, written and read back by the compiler's own frontend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from running import run_module
from torch import Tensor, nn
from torch.nn.utils import prune

from pumice.errors import UsageError
from pumice.frontend import read_model
from pumice.frontend.masks import apply_masks, read_masks
from pumice.frontend.torch import CubicSchedule, GradualPruner, add_fake_quantization, export
from pumice.module import inputs_of, layers_of, output_names_of, weights_of
from pumice.passes import RecordLayers, SimplifyModel


class Net(nn.Module):
    """Two convolutions with batch norm, and a linear layer on sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.ModuleDict({"dense": nn.Linear(16, 12)})

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(torch.relu(self.stem_bn(self.stem(image))))
        result: Tensor = self.head["dense"](x.flatten(2).transpose(1, 2))
        return result


IMAGE = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(3))


def trained(int8: bool) -> tuple[Net, GradualPruner]:
    torch.manual_seed(0)
    model = Net()
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = GradualPruner(model, CubicSchedule(0, 4, 0.2, 0.6), "1x4", keep=["stem"])
    if int8:
        add_fake_quantization(model)
    for _ in range(6):
        optimiser.zero_grad()
        model(IMAGE).square().mean().backward()
        optimiser.step()
        pruner.step()
    return model, pruner


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_names_zeros_and_pattern_are_found(suffix: str, int8: bool, tmp_path: Path) -> None:
    model, pruner = trained(int8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = export(model, (IMAGE,), tmp_path / f"net{suffix}", output_names=["y"])
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    mod = read_model(path)
    assert [variable.name for variable in inputs_of(mod)] == ["image"]
    assert output_names_of(mod) == (["y"] if suffix == ".onnx" else ["output"])
    simple = RecordLayers()(SimplifyModel()(mod))
    layers = layers_of(simple)
    assert list(layers) == ["stem", "conv", "head.dense"]
    for name, share in pruner.sparsity().items():
        if name != "all":
            record = layers[name.removesuffix(".weight")]
            assert record.weight == name and record.pattern == "1x4"
            assert record.block_sparsity == pytest.approx(share)
    plain = Net().eval()
    names = plain.state_dict().keys()
    state = {name.replace("parametrizations.weight.original", "weight"): value for name, value in before.items()}
    plain.load_state_dict({name: state[name] for name in names})
    with torch.no_grad():
        wanted = plain(IMAGE).numpy()
    got = run_module(mod, {"image": IMAGE.numpy()})[0]
    np.testing.assert_allclose(got, wanted, 1e-4, 1e-5)  # float32, sums of under 100 terms


def test_masks_go_beside_a_dense_model(tmp_path: Path) -> None:
    model, pruner = trained(int8=False)
    np.savez(tmp_path / "masks.npz", **pruner.masks())
    dense = export(Net(), (IMAGE,), tmp_path / "dense.pt2")
    mod = apply_masks(read_model(dense), read_masks(tmp_path / "masks.npz"))
    zero = weights_of(mod)["conv.weight"] == 0
    np.testing.assert_array_equal(zero, model.conv.weight.detach().numpy() == 0)


def test_torchs_own_masks_become_zeros(tmp_path: Path) -> None:
    model = Net()
    prune.random_unstructured(model.conv, "weight", 0.5)
    mod = read_model(export(model, (IMAGE,), tmp_path / "net.onnx"))
    np.testing.assert_array_equal(weights_of(mod)["conv.weight"], model.conv.weight.detach().numpy())


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_batch_of_any_size(suffix: str, tmp_path: Path) -> None:
    batch = ({0: torch.export.Dim("batch")},)
    path = export(Net(), (IMAGE,), tmp_path / f"net{suffix}", dynamic_shapes=batch)
    mod = read_model(path, {"image": (5, 3, 5, 5)})
    assert run_module(mod, {"image": np.zeros((5, 3, 5, 5), np.float32)})[0].shape == (5, 25, 12)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"net\.pt: a network is exported to a file that ends in \.onnx or \.pt2"):
        export(Net(), (IMAGE,), tmp_path / "net.pt")
