"""Networks compiled for GPUs, their kernels emulated on this CPU: the same numbers as on x86, to the bit in int8."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from gpu import BESIDE_THIS, FakeDriver, emulated_library, manifest_of, needs_gxx
from tiny import tiny_onnx
from tvm.ir import IRModule

import pumice
from pumice.demo.run import SHAPE, DemoData, read_data
from pumice.errors import MissingDependencyError
from pumice.frontend import read_model
from pumice.loader import load
from pumice.module import layers_of
from pumice.passes.link_steps import link_steps
from pumice.passes.pipeline import LowerOptions, lower
from pumice.prepare import prepare
from pumice.recipe import Recipe
from pumice.stages import Stages
from pumice.targets.executor import build_executor
from pumice.targets.library import build_code, write_library
from pumice.targets.target import Target
from pumice.verify import make_check

pytestmark = needs_gxx

IMAGES = 200
LOADER = Path(str(files("pumice"))) / "loader.py"


def gpu_here() -> str:
    """The architecture of this machine's GPU, as ``sm_87``; empty without one, or without nvcc."""
    if not (shutil.which("nvidia-smi") and shutil.which("nvcc")):
        return ""
    asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    return f"sm_{said[0].replace('.', '')}" if said else ""


QUICK = Recipe(equalize=False, correct_bias=False)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return FakeDriver(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DemoData:
    return read_data(Path(str(files("pumice.demo"))), tmp_path_factory.mktemp("data"))


def on_this_cpu(mod: IRModule, feeds: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """The first output for each of ``feeds``."""
    target = Target.parse("native")
    executor = build_executor(link_steps(lower(mod, target, LowerOptions(1))), target)
    found = []
    for feed in feeds:
        for buffer, array in zip(executor.inputs, feed.values(), strict=True):
            buffer[...] = array
        executor.run()
        found.append(executor.outputs[0].copy())
    return found


def test_the_demo_network_gives_the_same_logits(driver, data, tmp_path):
    mod = read_model(data.models["blocks90"], {"image": SHAPE})
    mod = prepare(mod, QUICK, {"image": data.calibration_images[:100]}, None, Stages(None))
    emulated = emulated_library(mod, tmp_path / "model.so", {"image": data.test_images[:1]})
    expected = on_this_cpu(mod, [{"image": image[None]} for image in data.test_images[:IMAGES]])
    with load(emulated.path) as model:
        model.verify()
        logits = [model(image[None])["y0"] for image in data.test_images[:IMAGES]]
    np.testing.assert_array_equal(np.concatenate(logits), np.concatenate(expected))
    assert np.mean(np.concatenate(logits).argmax(1) == data.test_labels[:IMAGES]) > 0.9
    assert model.manifest["check"]["exact"] == len(emulated.plan.steps)


@pytest.mark.skipif(not gpu_here(), reason="needs an NVIDIA GPU, its driver and nvcc")
def test_a_gpu_gives_the_same_logits(data, tmp_path):
    """In processes of their own: here libraries find the faked driver."""
    mod = read_model(data.models["blocks90"], {"image": SHAPE})
    mod = prepare(mod, QUICK, {"image": data.calibration_images[:100]}, None, Stages(None))
    target, path, options = Target.parse(f"{gpu_here()}@x86-64"), tmp_path / "model.so", LowerOptions()
    plan = link_steps(lower(mod, target, options))
    code = build_code(plan, target)
    check = make_check(mod, target, options, plan, code, {"image": data.test_images[:1]})
    write_library(plan, target, manifest_of(plan, target), path, check=check, code=code)
    subprocess.run([sys.executable, LOADER, path, "verify"], check=True)
    images = data.test_images[:5]
    for image, expected in zip(images, on_this_cpu(mod, [{"image": image[None]} for image in images]), strict=True):
        np.savez(tmp_path / "in.npz", x0=image[None])
        subprocess.run([sys.executable, LOADER, path, "run", tmp_path / "in.npz", tmp_path / "out.npz"], check=True)
        np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["y0"], expected)


def test_two_of_four_weights_give_the_same_logits(driver, tmp_path):
    images = np.random.default_rng(1).random((8, 4, 8, 8), dtype=np.float32)
    mod = read_model(tiny_onnx(1, channels=4), {"image": (1, 4, 8, 8)})
    mod = prepare(mod, QUICK.but(prune="magnitude:2:4"), {"image": images}, None, Stages(None))
    layers = layers_of(lower(mod, BESIDE_THIS, LowerOptions()))
    assert layers["stem"].kernel == layers["conv"].kernel == "2:4 int8 tensor cores"
    emulated = emulated_library(mod, tmp_path / "model.so", {"image": images[:1]})
    expected = on_this_cpu(mod, [{"image": image[None]} for image in images])
    with load(emulated.path) as model:
        model.verify()
        logits = [model(image[None])["y0"] for image in images]
    np.testing.assert_array_equal(np.concatenate(logits), np.concatenate(expected))


@pytest.mark.parametrize("quantize", [True, False])
def test_a_transformer_is_exact_on_positions_that_fill_no_vectors(driver, tmp_path, quantize):
    torch = pytest.importorskip("torch", reason="the network is made by PyTorch: pip install torch")
    from transformer import SHAPE, Encoder

    x = {"x": np.random.default_rng(0).standard_normal((2, *SHAPE[1:])).astype(np.float32)}
    mod = read_model(Encoder().eval(), (torch.zeros(SHAPE),))
    mod = prepare(mod, replace(QUICK, quantize=quantize), x if quantize else None, None, Stages(None))
    first = {"x": x["x"][:1]}
    emulated = emulated_library(mod, tmp_path / "model.so", first)
    (expected,) = on_this_cpu(mod, [first])
    with load(emulated.path) as model:
        assert model.manifest["check"]["exact"] == len(emulated.plan.steps)
        model.verify()
        np.testing.assert_array_equal(model(first["x"])["y0"], expected)


@pytest.mark.parametrize("quantize", [True, False])
def test_probabilities_of_one_example_are_a_row_without_a_loop(driver, tmp_path, quantize):
    torch = pytest.importorskip("torch", reason="the network is made by PyTorch: pip install torch")

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.linear(x.mean(1)), -1)

    x = {"x": np.random.default_rng(0).standard_normal((2, 24, 16)).astype(np.float32)}
    mod = read_model(Classifier().eval(), (torch.zeros(1, 24, 16),))
    mod = prepare(mod, replace(QUICK, quantize=quantize), x if quantize else None, None, Stages(None))
    first = {"x": x["x"][:1]}
    emulated = emulated_library(mod, tmp_path / "model.so", first)
    (expected,) = on_this_cpu(mod, [first])
    with load(emulated.path) as model:
        model.verify()
        np.testing.assert_allclose(model(first["x"])["y0"], expected, 1e-5)


def test_the_threads_of_a_gpu_add_floats_in_an_order_of_their_own(driver, tmp_path):
    """A float layer with one position: its numbers are right, but nothing promises the last bit."""
    torch = pytest.importorskip("torch", reason="the network is made by PyTorch: pip install torch")

    torch.manual_seed(0)
    mod = read_model(torch.nn.Linear(300, 8).eval(), (torch.zeros(1, 300),))
    mod = prepare(mod, replace(QUICK, quantize=False), None, None, Stages(None))
    emulated = emulated_library(mod, tmp_path / "model.so")
    layer = next(i for i, step in enumerate(emulated.plan.steps) if step.layer)
    with load(emulated.path) as model:
        assert model.manifest["check"]["exact"] == layer
        model.verify()


@pytest.mark.slow
def test_mobilenet_gives_the_same_integers(driver, tmp_path):
    torch = pytest.importorskip("torch", reason="the network is made by PyTorch: pip install torch")
    from bench.networks import MobileNetV2

    torch.manual_seed(0)
    image = np.random.default_rng(0).standard_normal((2, 3, 96, 96)).astype(np.float32)
    mod = prepare(
        read_model(MobileNetV2().eval(), (torch.zeros(1, 3, 96, 96),)),
        Recipe(equalize=False, correct_bias=False).but(prune="magnitude:1x4:0.7"),
        {"image": image},
        None,
        Stages(None),
    )
    emulated = emulated_library(mod, tmp_path / "model.so", {"image": image[:1]})
    (expected,) = on_this_cpu(mod, [{"image": image[1:]}])
    with load(emulated.path) as model:
        model.verify()
        np.testing.assert_array_equal(model(image[1:])["y0"], expected)


@pytest.mark.slow
def test_a_sentence_encoder_gives_the_same_embedding(driver, tmp_path):
    """Exact but for the norm of the embedding itself, by a power of libm."""
    torch = pytest.importorskip("torch", reason="the network is made by PyTorch: pip install torch")
    from bench.networks import MiniLM

    torch.manual_seed(0)
    draw, mask = np.random.default_rng(0), np.ones((2, 64), np.int64)
    mask[:, 40:] = 0
    tokens = {
        "input_ids": draw.integers(0, 30000, (2, 64)),
        "attention_mask": mask,
        "token_type_ids": np.zeros((2, 64), np.int64),
    }
    examples = tuple(torch.from_numpy(array[:1]) for array in tokens.values())
    mod = prepare(
        read_model(MiniLM().eval(), examples),
        Recipe(equalize=False, correct_bias=False).but(prune="magnitude:1x4:0.8"),
        tokens,
        None,
        Stages(None),
    )
    first = {name: array[:1] for name, array in tokens.items()}
    emulated = emulated_library(mod, tmp_path / "model.so", first)
    (expected,) = on_this_cpu(mod, [first])
    with load(emulated.path) as model:
        model.verify()
        np.testing.assert_allclose(model(*first.values())["y0"], expected, atol=0.02)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc: apt-get install nvidia-cuda-toolkit")
def test_a_library_has_code_for_every_architecture(tmp_path):
    """Without a driver it is compiled, saved and described; only running it is refused."""
    samples = np.random.default_rng(1).random((4, 1, 8, 8), dtype=np.float32)
    arguments = {"inputs": {"image": (1, 1, 8, 8)}, "calibration": {"image": samples}, "target": "cuda@x86-64"}
    model = pumice.compile(tiny_onnx(), **arguments)
    assert model.manifest["target"]["gpus"] == list(Target.parse("cuda").gpus)
    assert all("cuda" in layer.kernel for layer in model.layers)
    model.save(tmp_path / "model.so")
    pumice.compile(tiny_onnx(), **arguments).save(tmp_path / "again.so")
    assert (tmp_path / "model.so").read_bytes() == (tmp_path / "again.so").read_bytes()


def test_without_nvcc_the_message_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr("pumice.targets.nvcc.USUAL", str(tmp_path / "nvcc"))
    monkeypatch.setattr("pumice.targets.nvcc._in_wheels", list)
    monkeypatch.setattr("pumice.driver.find_toolchain", lambda *_: None)
    with pytest.raises(MissingDependencyError, match=r"nvcc.*nvidia-cuda-toolkit"):
        pumice.compile(tiny_onnx(), inputs={"image": (1, 1, 8, 8)}, target="sm_87", quantize=False)
