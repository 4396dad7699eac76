"""The networks that the benchmarks compile, in plain torch, with the parameter names of the published weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bert(nn.Module):
    """BERT with mean pooling over the real tokens and a unit-length result.

    Token ids, mask and types ``[B, T]`` (int64) to sentence embeddings ``[B, width]``.
    Source: BERT (arXiv 1810.04805), Sentence-BERT (arXiv 1908.10084).
    """

    HEADS, TOKENS, POSITIONS = 12, 30522, 512

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(self.TOKENS, width),
                "position_embeddings": nn.Embedding(self.POSITIONS, width),
                "token_type_embeddings": nn.Embedding(2, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList(_EncoderLayer(width, 4 * width, self.HEADS) for _ in range(layers))}
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Encode a batch of padded sentences."""
        tables = self.embeddings
        x = tables["word_embeddings"](input_ids) + tables["token_type_embeddings"](token_type_ids)
        x = tables["LayerNorm"](x + tables["position_embeddings"].weight[: input_ids.shape[1]])
        real = attention_mask.to(x.dtype)
        bias = (1 - real)[:, None, None, :] * torch.finfo(x.dtype).min
        for layer in self.encoder["layer"]:
            x = layer(x, bias)
        weight = real[:, :, None]
        mean = (x * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return F.normalize(mean, dim=1)


class BertBase(Bert):
    """BERT-base: twelve layers of width 768."""

    def __init__(self) -> None:
        super().__init__(768, 12)


class MiniLM(Bert):
    """MiniLM-L6: six layers of width 384. Source: arXiv 2002.10957."""

    def __init__(self) -> None:
        super().__init__(384, 6)


class _EncoderLayer(nn.Module):
    """Self-attention and a two-layer perceptron, each followed by a sum and a layer norm."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": projections, "output": _dense_and_norm(width, width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = _dense_and_norm(hidden, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """``[B, T, width]`` to the same; ``bias`` is added to the attention scores."""
        query, key, value = (
            projection(x).unflatten(2, (self._heads, -1)).transpose(1, 2)
            for projection in self.attention["self"].values()
        )
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5 + bias
        context = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = _add_and_norm(self.attention["output"], context, x)
        return _add_and_norm(self.output, F.gelu(self.intermediate["dense"](x)), x)


def _dense_and_norm(inputs: int, width: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inputs, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})


def _add_and_norm(parts: nn.ModuleDict, x: Tensor, residual: Tensor) -> Tensor:
    result: Tensor = parts["LayerNorm"](parts["dense"](x) + residual)
    return result


class MobileNetV2(nn.Module):
    """MobileNetV2 1.0, 1000 classes: images ``[B, 3, 224, 224]`` to logits. Source: arXiv 1801.04381."""

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = [_conv_norm(3, 32, 3, 2)]
        channels = 32
        for expansion, outputs, repeats, stride in self.STAGES:
            for index in range(repeats):
                blocks.append(_InvertedResidual(channels, outputs, expansion, stride if index == 0 else 1))
                channels = outputs
        blocks.append(_conv_norm(channels, 1280, 1))
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, image: Tensor) -> Tensor:
        """Classify a batch of normalised images."""
        logits: Tensor = self.classifier(self.features(image).mean((2, 3)))
        return logits


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [_conv_norm(inputs, hidden, 1)] if expansion != 1 else []
        depthwise = _conv_norm(hidden, hidden, 3, stride, groups=hidden)
        project = [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*expand, depthwise, *project)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(x)
        return x + result if self.residual else result


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class ResNet50(nn.Module):
    """ResNet-50, stride in the 3 x 3 convolution: images ``[B, 3, 224, 224]`` to logits. Source: arXiv 1512.03385."""

    STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1)
        stages, channels = [], 64
        for width, repeats, stride in self.STAGES:
            blocks = [_Bottleneck(channels, width, stride)]
            channels = 4 * width
            blocks += [_Bottleneck(channels, width, 1) for _ in range(repeats - 1)]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, 1000)

    def forward(self, image: Tensor) -> Tensor:
        """Classify a batch of normalised images."""
        x = self.stages(self.pool(F.relu(self.bn1(self.conv1(image)))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        inner = F.relu(self.bn2(self.conv2(inner)))
        return F.relu(self.bn3(self.conv3(inner)) + self.shortcut(x))


class Perceptron(nn.Sequential):
    """784-1024-1024-10 with ReLU: flattened images ``[B, 784]`` to logits."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def randomise(network: nn.Module, seed: int) -> None:
    """He-normal weights, and batch-norm scales and statistics as a trained network has them, all from one seed."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0, generator=generator)
            nn.init.normal_(module.bias, 0.0, 0.2, generator=generator)
            nn.init.normal_(module.running_mean, 0.0, 0.2, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 1.5, generator=generator)
