"""Live modules and saved programs in: names, masks, data types, and what is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import run_module
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from pumice.errors import ModelError, UnsupportedError, UsageError
from pumice.frontend.torch_model import read_pt2, read_torch
from pumice.module import inputs_of, mask_sources_of, output_names_of, source_of, weight_vars_of, weights_of


class Net(nn.Module):
    """A convolution, a batch norm, a plain and a pruned linear, a buffer, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout()
        self.head = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
        self.register_buffer("shift", torch.randn(4))

    def forward(self, image: Tensor, scale: Tensor) -> dict[str, Any]:
        x = torch.relu(self.bn(self.conv(image))).mean((2, 3))
        y = self.head(self.drop(x)) + self.shift
        return {"logits": y, "parts": [y * scale, x]}


IMAGE, SCALE = torch.randn(2, 3, 6, 6), torch.randn(4)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def assert_same(mod: Any, module: nn.Module) -> None:
    with torch.no_grad():
        wanted = module(IMAGE, SCALE)
    got = run_module(mod, {"image": IMAGE.numpy(), "scale": SCALE.numpy()})
    for value, want in zip(got, [wanted["logits"], *wanted["parts"]], strict=True):
        np.testing.assert_allclose(value, want.numpy(), 1e-5, 1e-5)  # float32, sums of under 100 terms


def test_names_are_those_of_the_module() -> None:
    module = net().eval()
    mod = read_torch(module, {"scale": SCALE, "image": (2, 3, 6, 6)})
    assert source_of(mod) == "Net"
    assert [variable.name for variable in inputs_of(mod)] == ["image", "scale"]
    assert output_names_of(mod) == ["logits", "parts.0", "parts.1"]
    state = {name: value.numpy() for name, value in module.state_dict().items() if "batches" not in name}
    assert weights_of(mod).keys() == state.keys() == {variable.name for variable in weight_vars_of(mod)}
    for name, value in weights_of(mod).items():
        np.testing.assert_array_equal(value, state[name])
    assert_same(mod, module)


def test_the_users_module_stays_as_it_was() -> None:
    module = net().train()
    prune.random_unstructured(module.conv, "weight", 0.5)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    flags = [part.training for part in module.modules()]
    read_torch(module, (IMAGE, SCALE))
    assert [part.training for part in module.modules()] == flags
    assert prune.is_pruned(module)
    assert all(parameter.requires_grad for parameter in module.parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_prune_masks_are_folded_into_the_plain_name() -> None:
    module = net().eval()
    prune.random_unstructured(module.conv, "weight", 0.5)
    prune.l1_unstructured(module.conv, "weight", 0.3)  # a second one: a PruningContainer
    prune.ln_structured(module.head[0], "weight", 0.5, 1, dim=1)
    prune.random_unstructured(module.head[2], "bias", 0.5)
    mod = read_torch(module, (IMAGE, SCALE))
    assert mask_sources_of(mod) == dict.fromkeys(
        ["conv.weight", "head.0.weight", "head.2.bias"], "torch.nn.utils.prune"
    )
    for name, part in (("conv", module.conv), ("head.0", module.head[0])):
        weight, kept = weights_of(mod)[f"{name}.weight"], part.weight_mask.numpy() == 1
        assert not weight[~kept].view("u4").any()
        np.testing.assert_array_equal(weight[kept], part.weight_orig.detach().numpy()[kept])
    assert not any("orig" in name or "mask" in name for name in weights_of(mod))
    assert_same(mod, module)


class Masked(nn.Module):
    """A parametrization that multiplies by a mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def test_masks_of_parametrizations_are_folded() -> None:
    module = net().eval()
    mask = (torch.rand(8, 3, 3, 3) > 0.5).float()
    parametrize.register_parametrization(module.conv, "weight", Masked(mask))
    torch.nn.utils.parametrizations.weight_norm(module.head[0])
    mod = read_torch(module, (IMAGE, SCALE))
    assert mask_sources_of(mod) == {"conv.weight": "torch.nn.utils.parametrize"}
    assert not weights_of(mod)["conv.weight"][mask.numpy() == 0].view("u4").any()
    assert "head.0.weight" in weights_of(mod)
    assert_same(mod, module)
    assert parametrize.is_parametrized(module.conv)


def test_a_mask_of_fractions_is_refused() -> None:
    module = net()
    prune.custom_from_mask(module.conv, "weight", torch.full((8, 3, 3, 3), 0.5))
    with pytest.raises(ModelError, match=r"Net: 'conv\.weight_mask' holds values other than 0 and 1"):
        read_torch(module, (IMAGE, SCALE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_widths_are_read_as_float32(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    module = net().eval().to(dtype)
    mod = read_torch(module, (IMAGE.to(dtype), SCALE.to(dtype)))
    assert {str(value.dtype) for value in weights_of(mod).values()} == {"float32"}
    assert f"weights in {str(dtype).removeprefix('torch.')} are read as float32" in caplog.text
    assert module.conv.weight.dtype == dtype


def test_tied_weights_are_each_there() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 8)
            self.out = nn.Linear(8, 5, bias=False)
            self.out.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.table(ids))

    module, ids = Tied(), torch.tensor([[0, 4, 2]])
    mod = read_torch(module, {"ids": ids})
    assert output_names_of(mod) == ["output"]
    np.testing.assert_allclose(run_module(mod, {"ids": ids.numpy()})[0], module(ids).detach().numpy(), 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"image": IMAGE}, UsageError, "do not fit forward"),
        ({"image": IMAGE, "scale": SCALE, "mask": SCALE}, UsageError, "do not fit forward"),
        ({"image": (2, 3, 0, 6), "scale": SCALE}, UsageError, "every extent must be positive"),
        ({"image": "x.png", "scale": SCALE}, UsageError, "is of type str"),
        ({"image": (2, 4, 6, 6), "scale": SCALE}, ModelError, "forward fails on the example inputs"),
        ([IMAGE, SCALE], UsageError, "a dict of shapes"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^Net: .*{message}") as caught:
        read_torch(net(), inputs)
    assert "\n" not in str(caught.value)


def test_control_flow_on_data_is_refused() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedError, match=r"^Branch: torch\.export cannot trace forward"):
        read_torch(Branch(), (torch.ones(3),))


def test_a_model_with_state_is_refused() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x + self.count

    with pytest.raises(UnsupportedError, match="Counter: changes 'count' while it runs"):
        read_torch(Counter(), (torch.ones(3),))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned network, exported with a dynamic batch."""
    module = net().eval()
    prune.random_unstructured(module.conv, "weight", 0.5)
    batch = torch.export.Dim("batch", min=2, max=16)
    program = torch.export.export(module, (IMAGE, SCALE), dynamic_shapes={"image": {0: batch}, "scale": None})
    path = tmp_path_factory.mktemp("saved") / "net.pt2"
    torch.export.save(program, path)
    return path


def test_a_saved_program_is_read_with_its_masks(saved: Path) -> None:
    mod = read_pt2(saved, {"image": (2, 3, 6, 6)})
    module = net().eval()
    prune.random_unstructured(module.conv, "weight", 0.5)
    assert source_of(mod) == "net.pt2"
    assert output_names_of(mod) == ["logits", "parts.0", "parts.1"]
    assert mask_sources_of(mod) == {"conv.weight": "torch.nn.utils.prune"}
    assert {"conv.weight", "bn.running_mean", "head.0.weight", "shift"} <= weights_of(mod).keys()
    assert_same(mod, module)


def test_a_saved_program_with_static_shapes_needs_no_inputs(tmp_path: Path) -> None:
    module = net().eval()
    torch.export.save(torch.export.export(module, (IMAGE, SCALE)), tmp_path / "static.pt2")
    assert_same(read_pt2(tmp_path / "static.pt2"), module)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, r"'image' has the dynamic shape s\d+x3x6x6: give one, as in --input image=1x3x6x6"),
        ({"image": (2, 3, 6, 7)}, r"'image' was exported as s\d+x3x6x6, not 2x3x6x7"),
        ({"image": (2, 3, 6)}, r"'image' was exported as"),
        ({"image": (99, 3, 6, 6)}, r"does not take the shapes image=99x3x6x6"),
        ({"image": (2, 3, 6, 6), "picture": (1,)}, r"has no input 'picture'; its inputs are image, scale"),
    ],
)
def test_shapes_that_a_program_does_not_take_are_refused(saved: Path, inputs: Any, message: str) -> None:
    with pytest.raises(UsageError, match=rf"^net\.pt2: .*{message}"):
        read_pt2(saved, inputs)


def rewritten(
    saved: Path, path: Path, change: Callable[[dict[str, bytes]], None], method: int = zipfile.ZIP_STORED
) -> Path:
    """The saved archive with some members changed."""
    with zipfile.ZipFile(saved) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


class Trap:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def replaced(old: str, new: str) -> Callable[[dict[str, bytes], str], None]:
    def change(members: dict[str, bytes], mark: str) -> None:
        program = members["net/models/model.json"]
        assert old.encode() in program
        members["net/models/model.json"] = program.replace(old.encode(), new.replace("MARK", mark).encode())

    return change


def pickled_weight(members: dict[str, bytes], mark: str) -> None:
    name = "net/data/weights/model_weights_config.json"
    config = json.loads(members[name])
    config["config"]["shift"]["use_pickle"] = True
    members[name] = json.dumps(config).encode()
    members["net/data/weights/" + config["config"]["shift"]["path_name"]] = pickle.dumps(Trap(mark))


def legacy_weights(members: dict[str, bytes], mark: str) -> None:
    members["net/data/weights/model.pt"] = pickle.dumps(Trap(mark))
    del members["net/data/weights/model_weights_config.json"]


def custom_object(members: dict[str, bytes], mark: str) -> None:
    name = "net/data/constants/model_constants_config.json"
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    members[name] = json.dumps({"config": {"thing": entry}}).encode()
    members["net/data/constants/opaque_obj_0"] = pickle.dumps(Trap(mark))


def compiled_code(members: dict[str, bytes], mark: str) -> None:
    members["net/data/aotinductor/model/x.so"] = b"\x7fELF"


TRAPS: dict[str, Callable[[dict[str, bytes], str], None]] = {
    "a pickled weight": pickled_weight,
    "a legacy weights file": legacy_weights,
    "a pickled constant": custom_object,
    "compiled code": compiled_code,
    "an evaluated size": replaced('": "Symbol(', '": "__import__(\'os\').system(\'touch MARK\') or Symbol('),
    "a method in a size": replaced('"expr_str": "Symbol(', '"expr_str": "Symbol.__class__ and Symbol('),
    "a foreign operator": replaced("torch.ops.aten.relu.default", "torch.ops.evil.relu.default"),
    "a function of torch": replaced("torch.ops.aten.relu.default", "torch.hub.load"),
    "the shell": replaced("torch.ops.aten.relu.default", "torch.os.system"),
    "code in a name": replaced('"name": "image"', '"name": "image):\\n import os; os.system(\'touch MARK\')\\n#"'),
    "a module in a tree": replaced('builtins.dict', "collections.defaultdict"),
}  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_nothing_in_a_saved_program_is_executed(saved: Path, tmp_path: Path, trap: str) -> None:
    mark = tmp_path / "mark"
    path = rewritten(saved, tmp_path / "bad.pt2", lambda members: TRAPS[trap](members, str(mark)))
    with pytest.raises((ModelError, UnsupportedError), match=r"^bad\.pt2: ") as caught:
        read_pt2(path, {"image": (2, 3, 6, 6)})
    assert not mark.exists()
    assert "\n" not in str(caught.value)


def test_example_inputs_in_the_file_are_not_unpickled(saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    def change(members: dict[str, bytes]) -> None:
        members["net/data/sample_inputs/model.pt"] = pickle.dumps(Trap(str(mark)))

    read_pt2(rewritten(saved, tmp_path / "odd.pt2", change), {"image": (2, 3, 6, 6)})
    assert not mark.exists()


def bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/archive_format", "pt2")
        archive.writestr("net/models/model.json", bytes(64 << 20))
    return buffer.getvalue()


BAD_FILES = {
    "empty": lambda whole: b"",
    "random": lambda whole: bytes(range(256)) * 4,
    "html": lambda whole: b"<!DOCTYPE html><html>404</html>",
    "truncated": lambda whole: whole[: len(whole) // 2],
    "a pickle": lambda whole: pickle.dumps({"a": 1}),
    "another zip": lambda whole: zip_of({"a/b": b"c"}),
    "a bomb": lambda whole: bomb(),
    "no json": lambda whole: zip_of({"a/archive_format": b"pt2", "a/models/model.json": b"{oops"}),
    "deep json": lambda whole: zip_of({"a/archive_format": b"pt2", "a/models/model.json": b"[" * 100_000}),
    "no weights": lambda whole: zip_of({"a/archive_format": b"pt2", "a/models/model.json": b"{}"}),
}


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_no_program_is_refused(saved: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.pt2"
    path.write_bytes(BAD_FILES[kind](saved.read_bytes()))
    with pytest.raises(ModelError, match=r"^bad\.pt2: ") as caught:
        read_pt2(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_weight_is_refused(saved: Path, tmp_path: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        for name in list(members):
            if "/data/weights/weight_" in name:
                members[name] = members[name][:-4]

    with pytest.raises(ModelError, match=r"^bad\.pt2: "):
        read_pt2(rewritten(saved, tmp_path / "bad.pt2", change), {"image": (2, 3, 6, 6)})


@pytest.mark.parametrize("name", ["absent.pt2", "folder.pt2"])
def test_a_path_that_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(ModelError, match=rf"^{name}: "):
        read_pt2(tmp_path / name)
