"""The networks whose speed is measured, as ONNX models with random weights, and what they are fed."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch

from bench import engines, networks
from bench.engines import Feed

SEED = 20240817
TOKENS = 128


@dataclass(frozen=True)
class Subject:
    """One network: ``model`` builds it, ``feed`` makes so many samples."""

    title: str
    model: Callable[[], onnx.ModelProto]
    feed: Callable[[int], Feed]
    pointwise_only: bool = False  # only its 1 x 1 convolutions and linear layers are pruned
    quantized_operators: tuple[str, ...] | None = None  # of ONNX Runtime's quantizer; None: all that it can


def _torch(network: type[torch.nn.Module], feed: Callable[[int], Feed]) -> Callable[[], onnx.ModelProto]:
    """The network with random weights."""

    def export() -> onnx.ModelProto:
        instance = network()
        networks.randomise(instance, SEED)
        with TemporaryDirectory(prefix="pumice-") as folder:
            return onnx.load(engines.export(instance, feed(1), Path(folder, "model.onnx")))

    return export


def _demo() -> onnx.ModelProto:
    """The dense network of ``pumice demo``, with its trained weights, for one image."""
    stored = files("pumice.demo").joinpath("fashion.zip").read_bytes()
    with zipfile.ZipFile(io.BytesIO(stored)) as archive:
        model = onnx.load_from_string(archive.read("dense.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    return model


def _images(*shape: int) -> Callable[[int], Feed]:
    return lambda count: {"image": np.random.default_rng(SEED).standard_normal((count, *shape), np.float32)}


def _tokens(count: int) -> Feed:
    ids = np.random.default_rng(SEED).integers(1000, 30000, (count, TOKENS))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


_IMAGES = _images(3, 224, 224)
_MATRIX_PRODUCTS = ("MatMul", "Gemm")

SUBJECTS = {
    "resnet50": Subject("ResNet-50", _torch(networks.ResNet50, _IMAGES), _IMAGES),
    "mobilenet": Subject("MobileNetV2", _torch(networks.MobileNetV2, _IMAGES), _IMAGES, pointwise_only=True),
    "bert": Subject(
        "BERT-base, 128 tokens", _torch(networks.BertBase, _tokens), _tokens, quantized_operators=_MATRIX_PRODUCTS
    ),
    "minilm": Subject(
        "MiniLM-L6, 128 tokens", _torch(networks.MiniLM, _tokens), _tokens, quantized_operators=_MATRIX_PRODUCTS
    ),
    "demo": Subject("demo network", _demo, _images(1, 28, 28)),
    "mlp": Subject("MLP 784-1024-1024-10", _torch(networks.Perceptron, _images(784)), _images(784)),
}
