"""Every operator that the PyTorch frontend takes, held against torch's own numbers.

A family of cases is one model, exported and compiled once: its outputs are the cases' outputs in order.

Tolerance: both sides compute in float32 but may sum in another order and use other polynomials for exp, tanh or erf,
so a result may differ by a few units in the last place of the largest term: 1e-5 relative, with 1e-5 absolute where
terms cancel (all inputs here are of order 1). Integers, booleans and indices must agree exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from running import run_module
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pumice.errors import UnsupportedError
from pumice.frontend.torch_model import read_torch
from pumice.module import inputs_of

RTOL = ATOL = 1e-5


class Case(nn.Module):
    """A function of the inputs, with the layers it needs."""

    def __init__(self, function: Callable[..., Any], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.function = function
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self.layer, *inputs) if self.layer is not None else self.function(*inputs)


class Family(nn.Module):
    """Cases side by side, each with inputs of its own."""

    def __init__(self, cases: list[tuple[nn.Module, tuple[Tensor, ...]]]) -> None:
        super().__init__()
        self.cases = nn.ModuleList(case for case, _ in cases)
        self.arity = [len(inputs) for _, inputs in cases]

    def forward(self, inputs: list[Tensor]) -> list[Any]:
        outputs, start = [], 0
        for case, count in zip(self.cases, self.arity, strict=True):
            outputs.append(case(*inputs[start : start + count]))
            start += count
        return outputs


def fixed(module: nn.Module) -> nn.Module:
    """Evaluation mode, and statistics that a fresh layer does not have."""
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand_like(buffer) + 0.3)
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) * 0.4
    return module.eval()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def layers(*pairs: tuple[nn.Module, Tensor]) -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
    return [(layer, (x,)) for layer, x in pairs]


def functions(*pairs: tuple[Any, ...]) -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
    return [(Case(function), inputs) for function, *inputs in pairs for inputs in (tuple(inputs),)]


def image(*shape: int) -> Tensor:
    return normal(*(shape or (2, 6, 9, 8)))


def convolutions() -> list[Any]:
    made = []
    for options in (
        {},
        {"stride": 2},
        {"padding": 1},
        {"dilation": 2},
        {"groups": 3},
        {"groups": 6},
        {"bias": False},
        {"padding": "same"},
        {"padding": "same", "kernel_size": 4},
        {"padding": "same", "dilation": 2, "kernel_size": 2},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "replicate"},
        {"padding": 1, "padding_mode": "circular"},
    ):
        options = {"kernel_size": 3, **options}
        made += layers((nn.Conv2d(6, 12, **options), image()), (nn.Conv1d(6, 12, **options), normal(2, 6, 17)))
    made += layers(
        (nn.Conv2d(6, 12, 3, padding=(1, 2)), image()),
        (nn.Conv2d(6, 4, 3), normal(6, 9, 8)),
        (nn.Conv1d(6, 4, 3), normal(6, 9)),
        (nn.Conv3d(2, 4, 3, padding=1), normal(1, 2, 5, 6, 4)),
        (nn.Conv3d(2, 4, 3, groups=2, stride=2), normal(1, 2, 5, 6, 4)),
    )
    return made


def transposed_convolutions() -> list[Any]:
    made = []
    for options in (
        {},
        {"stride": 2},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"groups": 3, "stride": 2},
        {"dilation": 2, "bias": False},
    ):
        made += layers(
            (nn.ConvTranspose2d(6, 9, 3, **options), image()),
            (nn.ConvTranspose1d(6, 9, 3, **options), normal(2, 6, 11)),
        )
    return made


def normalisations() -> list[Any]:
    return layers(
        (nn.BatchNorm1d(6), normal(3, 6)),
        (nn.BatchNorm1d(6), normal(3, 6, 5)),
        (nn.BatchNorm2d(6), image()),
        (nn.BatchNorm2d(6, affine=False), image()),
        (nn.BatchNorm2d(6, eps=0.1), image()),
        (nn.BatchNorm2d(6, track_running_stats=False), image()),
        (nn.BatchNorm3d(2), normal(2, 2, 3, 3, 3)),
        (nn.GroupNorm(3, 6), image()),
        (nn.GroupNorm(1, 6, eps=0.1), image()),
        (nn.GroupNorm(3, 6, affine=False), image()),
        (nn.GroupNorm(3, 6), normal(2, 6, 7)),
        (nn.LayerNorm(8), image()),
        (nn.LayerNorm((9, 8)), image()),
        (nn.LayerNorm(8, elementwise_affine=False), image()),
        (nn.LayerNorm(8, bias=False), image()),
        (nn.InstanceNorm2d(6), image()),
        (nn.InstanceNorm2d(6, affine=True), image()),
        (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), image()),
        (nn.RMSNorm(8), image()),
        (nn.LocalResponseNorm(3), image()),
    )


def activations() -> list[Any]:
    names = "ReLU ReLU6 GELU SiLU Mish ELU CELU SELU Sigmoid Tanh LeakyReLU Hardswish Hardsigmoid Hardtanh Softplus"
    names += " Softsign Softshrink Hardshrink Tanhshrink LogSigmoid Identity Dropout GLU"
    far = torch.linspace(-60, 60, 122).reshape(2, 61)
    made = layers(*((getattr(nn, name)(), image() * 3) for name in names.split()))
    made += layers(*((getattr(nn, name)(), far) for name in names.split() if name != "GLU"))
    return made + layers(
        (nn.GELU(approximate="tanh"), image() * 3),
        (nn.ELU(0.7), image()),
        (nn.CELU(0.7), image()),
        (nn.LeakyReLU(0.3), image()),
        (nn.Hardtanh(-0.5, 0.7), image()),
        (nn.Softplus(2.0, 5.0), image() * 3),
        (nn.Threshold(0.1, -2.0), image()),
        (nn.PReLU(), image()),
        (nn.PReLU(6), image()),
        (nn.Softmax(1), image()),
        (nn.Softmax(-1), image()),
        (nn.LogSoftmax(1), image()),
        (nn.Softmin(1), image()),
        (nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(inplace=True)), image()),
    )


def pooling(rank: int) -> list[Any]:
    x = {1: normal(2, 6, 11), 2: image(2, 6, 9, 11), 3: normal(1, 2, 7, 6, 5)}[rank]
    made = []
    for options in (
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": 2, "ceil_mode": True},
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
        {"kernel_size": 2, "stride": 2, "ceil_mode": True},
    ):
        average = getattr(nn, f"AvgPool{rank}d")
        made += [getattr(nn, f"MaxPool{rank}d")(**options), average(**options)]
        made += [average(**options, count_include_pad=False)]
    made += [getattr(nn, f"AdaptiveAvgPool{rank}d")(size) for size in (1, 2, 3, 4)]
    return layers(*((layer, x) for layer in made), *([(nn.MaxPool2d(3, 1, 1, 2), x)] if rank == 2 else []))


def matrix_products() -> list[Any]:
    made = []
    for bias in (True, False):
        made += layers(*((nn.Linear(8, 5, bias=bias), x) for x in (normal(4, 8), normal(2, 3, 8), normal(8))))
    made += functions(
        (lambda a, b: a @ b, normal(2, 3, 4), normal(4, 5)),
        (lambda a, b: a @ b, normal(2, 3, 4, 5), normal(3, 5, 6)),
        (lambda a, b: a @ b, normal(3, 4), normal(4)),
        (lambda a, b: a @ b, normal(4), normal(2, 4, 5)),
        (lambda a, b: a @ b, normal(4), normal(4)),
        (torch.bmm, normal(2, 3, 4), normal(2, 4, 5)),
        (torch.mm, normal(3, 4), normal(4, 5)),
        (torch.outer, normal(3), normal(4)),
        (lambda a, b, c: torch.addmm(a, b, c, beta=0.5, alpha=2.0), normal(5), normal(3, 4), normal(4, 5)),
        (
            lambda a, b, c: torch.baddbmm(a, b, c, beta=0.5, alpha=2.0),
            normal(2, 3, 5),
            normal(2, 3, 4),
            normal(2, 4, 5),
        ),
        (lambda a, b: torch.einsum("bik,bkj->bij", a, b), normal(2, 3, 4), normal(2, 4, 5)),
        (lambda a, b: torch.einsum("bhqd,bhkd->bhqk", a, b), normal(2, 3, 4, 5), normal(2, 3, 6, 5)),
        (lambda a: torch.einsum("bii->bi", a), normal(2, 4, 4)),
        (lambda a, b: torch.einsum("i,j->ij", a, b), normal(3), normal(4)),
    )
    ids = torch.randint(0, 10, (2, 5))
    made += layers((nn.Embedding(10, 6), ids), (nn.Embedding(10, 6), ids[0]), (nn.Embedding(10, 6, 2), ids.int()))
    return made


def attention() -> list[Any]:
    attend = F.scaled_dot_product_attention
    some = torch.rand(2, 1, 5, 7) > 0.4
    empty_row = torch.rand(5, 7) > 0.4
    empty_row[2] = False
    padded = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    q, k, v = normal(2, 3, 5, 4), normal(2, 3, 7, 4), normal(2, 3, 7, 6)
    x, y = normal(2, 5, 16), normal(2, 7, 16)
    made = functions(
        (lambda *qkv: attend(*qkv), q, k, v),
        (lambda *qkv: attend(*qkv, is_causal=True), q, k, v),
        (lambda *qkv: attend(*qkv, scale=0.3), q, k, v),
        (lambda q, k, v, m: attend(q, k, v, attn_mask=m), q, k, v, some),
        (lambda q, k, v, m: attend(q, k, v, attn_mask=m), q, k, v, empty_row),
        (lambda q, k, v, m: attend(q, k, v, attn_mask=m), q, k, v, normal(5, 7)),
        (lambda *qkv: attend(*qkv), normal(3, 5, 4), normal(3, 7, 4), normal(3, 7, 4)),
        (lambda *qkv: attend(*qkv), normal(5, 4), normal(7, 4), normal(7, 4)),
    )
    heads = nn.MultiheadAttention(16, 4, batch_first=True)
    other = nn.MultiheadAttention(16, 4, kdim=8, vdim=8, add_bias_kv=True)
    made += [
        (Case(lambda m, x, y: m(x, y, y), heads), (x, y)),
        (Case(lambda m, x: m(x, x, x, need_weights=False)[0], heads), (x,)),
        (Case(lambda m, x, y: m(x, y, y, need_weights=False)[0], other), (normal(5, 2, 16), normal(7, 2, 8))),
        (Case(lambda m, x, hidden: m(x, x, x, key_padding_mask=hidden)[0], heads), (x, padded)),
    ]
    for options in ({}, {"norm_first": True}, {"activation": "gelu"}, {"batch_first": False}):
        made += layers((nn.TransformerEncoderLayer(16, 4, 32, **{"batch_first": True, **options}), x))
    encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    decoder = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)
    later = nn.Transformer.generate_square_subsequent_mask(5)
    return [
        *made,
        (Case(lambda m, x, hidden: m(x, src_key_padding_mask=hidden), encoder), (x, padded)),
        (Case(lambda m, x, y: m(x, y, tgt_mask=later, tgt_is_causal=True), decoder), (x, y)),
    ]


def shapes() -> list[Any]:
    x, y = normal(2, 6, 4, 3), normal(2, 5, 8)
    index = torch.tensor([0, 4, 2])
    of_x = (
        lambda x: torch.cat([x, x * 2], 1),
        lambda x: torch.cat([x, x * 2], -1),
        lambda x: torch.stack([x, x * 2], -1),
        lambda x: torch.split(x, [1, 2, 3], 1),
        lambda x: torch.split(x, 4, 1),
        lambda x: x.chunk(3, 1)[2],
        lambda x: x.chunk(4, 1),
        lambda x: x.unbind(1)[2],
        lambda x: x.view(2, -1),
        lambda x: x.transpose(1, 2).reshape(2, -1, 4),
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x.flatten(1),
        lambda x: x.flatten(2).transpose(1, 2),
        lambda x: x.unflatten(1, (2, 3)),
        lambda x: x.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1),
        lambda x: x[:1].squeeze(),
        lambda x: x.unsqueeze(1).unsqueeze(-1),
        lambda x: x[:, :1].expand(-1, 4, -1, -1),
        lambda x: x.repeat(2, 1, 1, 1, 3),
        lambda x: x.repeat_interleave(2, 1),
        lambda x: x.transpose(1, 2).contiguous().view(2, -1),
        lambda x: F.pixel_shuffle(x[:, :4], 2),
        lambda x: F.pixel_unshuffle(x[..., :2], 2),
        lambda x: F.unfold(x, 2),
        lambda x: x,
    )
    of_y = (
        lambda y: y[:, 1:4, ::2],
        lambda y: y[:, -3:-1],
        lambda y: y[:, 0],
        lambda y: y[:, -1],
        lambda y: y.narrow(1, 1, 3),
        lambda y: y[:, [0, 2, 1]],
        lambda y: y[:, [-1, 2, 1]],
        lambda y: y.roll((1, -2), (1, 2)),
        lambda y: y.roll(3),
        lambda y: y.flip(1, 2),
        lambda y: y.tril(-1),
        lambda y: y.triu(1),
        lambda y: y.diagonal(0, 1, 2),
        lambda y: y.masked_fill(y > 0, -1.5),
        lambda y: y.masked_fill(y > 1, float("-inf")).softmax(-1),
        lambda y: torch.where(y > 0, y, 0.0),
        lambda y: torch.where(y > 0, 1.0, 0.0),
        written,
        lambda y: (y + 1).mul_(2).add_(1).relu_(),
        without_gradient,
        lambda y: {"a": y + 1, "b": [y * 2, y * 3]},
    )
    return functions(
        *((function, x) for function in of_x),
        *((function, y) for function in of_y),
        (lambda y, i: y[:, i], y, index),
        (lambda y, i: y[i], normal(5, 4), torch.tensor([[0, -1], [3, 2]])),
        (lambda y, i, j: y[i, j], y, torch.tensor([0, -1]), torch.tensor([4, -2])),
        (lambda y, i: y.gather(1, i), y, torch.randint(0, 5, (2, 3, 8))),
        (lambda y, i: y.index_select(1, i), y, index),
        (lambda y, i: y.scatter(1, i, 2.0), y, torch.zeros(2, 1, 8, dtype=torch.long)),
    )


def written(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1] = 0
    y[:, :, 2:4] += 1
    return y


def without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x * 2
    return y + x


def resizing() -> list[Any]:
    x = image()
    options = (
        {"scale_factor": 2},
        {"size": (13, 11)},
        {"size": (4, 5)},
        {"scale_factor": 1.5},
        {"scale_factor": 1.7, "recompute_scale_factor": True},
        {"size": (13, 11), "mode": "nearest-exact"},
        {"scale_factor": 2, "mode": "bilinear"},
        {"size": (13, 11), "mode": "bilinear", "align_corners": True},
        {"size": (13, 11), "mode": "bilinear"},
        {"size": (4, 5), "mode": "bilinear"},
    )
    made = functions(*((lambda x, o=o: F.interpolate(x, **o), x) for o in options))
    made += functions(
        *((lambda x, m=m: F.pad(x, (1, 2, 2, 1), mode=m), x) for m in ("constant", "reflect", "replicate", "circular"))
    )
    return made + functions(
        (lambda x: F.pad(x, (1, 2), value=3.5), x),
        (lambda x: F.pad(x, (-1, 2, 0, -2)), x),
        (lambda x: F.pad(x, (2, 1), mode="reflect"), normal(2, 5, 8)),
        (lambda x: F.interpolate(x, scale_factor=2), normal(2, 5, 8)),
    )


def arithmetic() -> list[Any]:
    names = "abs exp neg sign floor ceil round trunc sin cos tan sinh cosh asinh atan erf expm1 square sigmoid tanh"
    positive = "log sqrt rsqrt log1p log2 log10 reciprocal acos asin atanh"
    made = functions(*((getattr(torch, name), normal(3, 7) * 3) for name in names.split()))
    made += functions(*((getattr(torch, name), torch.rand(3, 7) * 0.9 + 0.05) for name in positive.split()))
    made += functions((torch.acosh, torch.rand(3, 4) + 1.5), (torch.round, torch.arange(-3.5, 4)))
    a, b, i, j = normal(3, 4), normal(3, 4), torch.randint(-9, 9, (3, 4)), torch.randint(1, 9, (3, 4))
    both = (
        lambda x, y: x + y,
        lambda x, y: x - y,
        lambda x, y: x * y,
        lambda x, y: x % y,
        lambda x, y: torch.fmod(x, y),
        torch.maximum,
        torch.minimum,
        lambda x, y: x + 2,
        lambda x, y: x % 3,
        lambda x, y: x**2,
        lambda x, y: x**3,
        lambda x, y: x == y,
        lambda x, y: x != y,
        lambda x, y: x > y,
        lambda x, y: x >= y,
        lambda x, y: x < y,
        lambda x, y: x <= y,
        lambda x, y: (x <= 0) & (y > 1),
        lambda x, y: (x > 0) | (y > 3),
        lambda x, y: ~(x > 0),
        lambda x, y: torch.logical_and(x, y > 1),
        lambda x, y: torch.logical_or(x > 1, y > 1),
        lambda x, y: torch.logical_xor(x, y),
        lambda x, y: x.clamp(-1, 1),
        lambda x, y: x.clamp(min=0),
        lambda x, y: x.clamp(max=0),
        lambda x, y: x.float(),
        lambda x, y: x.int(),
        lambda x, y: x.bool(),
        lambda x, y: x * (y > 1),
    )
    made += functions(*((function, a, b) for function in both), *((function, i, j) for function in both))
    return made + functions(
        (lambda x: 1.5 - x, a),
        (lambda x, y: torch.rsub(x, y), a, b),
        (lambda x, y: x / y, a, b),
        (lambda x: x / 3, a),
        (lambda x: 2 / x, a),
        (lambda x, y: torch.div(x, y, rounding_mode="trunc"), a, b),
        (lambda x, y: torch.div(x, y, rounding_mode="floor"), a, b),
        (lambda x: x // 2, i),
        (lambda x, y: x.clamp(max=y), a, b),
        (lambda x, y: torch.addcmul(x, x, y, value=0.5), a, b),
        (lambda x, y: torch.lerp(x, y, 0.3), a, b),
        (torch.atan2, a, b),
        (lambda x, y: x + y, a, j),
        (lambda x, y: x + y, normal(2, 1, 4), normal(3, 1)),
        (lambda x, y: x.abs() ** y, a, b),
        (lambda x: 2**x, a),
        (lambda x: x.abs() ** 0.5, a),
        (lambda x: x**-1, a),
        (lambda x: x & 3, i),
        (lambda x: torch.round(x, decimals=2), a),
        (torch.isnan, a),
        (torch.nan_to_num, a),
    )


def reductions() -> list[Any]:
    of_x = (
        lambda x: x.sum(),
        lambda x: x.sum(1),
        lambda x: x.sum((1, 2), keepdim=True),
        lambda x: x.mean(),
        lambda x: x.mean(-1, keepdim=True),
        lambda x: x.max(),
        lambda x: x.min(),
        lambda x: x.amax(1),
        lambda x: x.amin((1, 2)),
        lambda x: x.max(1),
        lambda x: x.argmax(1),
        lambda x: x.argmax(1, keepdim=True),
        lambda x: x.argmax(),
        lambda x: x.argmin(-1),
        lambda x: x.var(1),
        lambda x: x.var(1, unbiased=False),
        lambda x: x.var((1, 2)),
        lambda x: x.std(1),
        lambda x: x.std(),
        lambda x: x.prod(1),
        lambda x: x.prod(),
        lambda x: x.cumsum(1),
        lambda x: x.cumprod(1),
        lambda x: x.norm(dim=1),
        lambda x: x.norm(p=1, dim=1, keepdim=True),
        lambda x: x.norm(),
        lambda x: torch.linalg.vector_norm(x, float("inf"), dim=1),
        lambda x: F.normalize(x, dim=1),
        lambda x: x.logsumexp(1),
        lambda x: F.cosine_similarity(x, x * 2 + 1, 1),
        lambda x: (x > 0).any(1),
        lambda x: (x > 0).all(1),
        lambda x: (x > 9).any(),
        lambda x: (x > 0).sum(1),
        lambda x: x.sum(1, dtype=torch.float32),
        lambda x: x.topk(3, 1),
        lambda x: x.topk(3, 1, largest=False)[0],
        lambda x: x.sort(1),
        lambda x: x.sort(1, descending=True)[0],
    )
    made_here = (
        lambda x: x + torch.arange(8),
        lambda x: x + torch.arange(0, 4, 0.5),
        lambda x: x * torch.ones(8) * 2 + torch.zeros(8) + torch.full((8,), 2.5),
        lambda x: torch.zeros_like(x) + x * torch.full_like(x, 3) + torch.ones_like(x),
        lambda x: x @ torch.eye(8),
        lambda x: x + torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]),
        lambda x: x + torch.linspace(0, 1, 8),
        lambda x: x.new_zeros(2, 5, 8) + x,
        lambda x: (x @ x.mT).masked_fill(torch.triu(torch.ones(5, 5), 1).bool(), float("-inf")).softmax(-1),
        lambda x: torch.empty(2, 5, 8).copy_(x),
    )
    x = normal(2, 5, 8)
    return functions(
        *((function, x) for function in (*of_x, *made_here)),
        (lambda i: i.sum(1), torch.randint(-9, 9, (3, 4))),
        (lambda i: i.amax(1), torch.randint(-9, 9, (3, 4))),
        (lambda i: i.ne(1).int().cumsum(1, dtype=torch.int64), torch.randint(0, 3, (3, 4))),
    )


def recurrent() -> list[Any]:
    x = normal(2, 4, 8)
    return [
        (Case(lambda m, x: m(x)[0], nn.LSTM(8, 6, batch_first=True)), (x,)),
        (Case(lambda m, x: m(x)[0], nn.LSTM(8, 6, bidirectional=True)), (x,)),
        (Case(lambda m, x: m(x)[0], nn.GRU(8, 6, num_layers=2)), (x,)),
        (Case(lambda m, x: m(x)[0], nn.RNN(8, 6)), (x,)),
        (nn.LSTMCell(8, 6), (normal(2, 8),)),
        (nn.GRUCell(8, 6), (normal(2, 8),)),
        (Case(lambda m, x: m(x), torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))), (x,)),
    ]


FAMILIES = {
    "convolutions": convolutions,
    "transposed convolutions": transposed_convolutions,
    "normalisations": normalisations,
    "activations": activations,
    "pooling 1d": lambda: pooling(1),
    "pooling 2d": lambda: pooling(2),
    "pooling 3d": lambda: pooling(3),
    "matrix products": matrix_products,
    "attention": attention,
    "shapes": shapes,
    "resizing": resizing,
    "arithmetic": arithmetic,
    "reductions": reductions,
    "recurrent": recurrent,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_those_of_torch(family: str) -> None:
    torch.manual_seed(0)
    cases = FAMILIES[family]()
    module = fixed(Family(cases))
    inputs = [x for _, xs in cases for x in xs]
    with torch.no_grad():
        wanted = pytree.tree_leaves_with_path(module([x.clone() for x in inputs]))
    mod = read_torch(module, ([x.clone() for x in inputs],))
    names = [variable.name for variable in inputs_of(mod)]
    got = run_module(mod, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    assert len(got) == len(wanted)
    wrong = []
    for (path, want), value in zip(wanted, got, strict=True):
        reference = want.numpy()
        same = value.shape == reference.shape and value.dtype == reference.dtype
        same = same and (
            np.allclose(value, reference, RTOL, ATOL, equal_nan=True)
            if value.dtype.kind == "f"
            else np.array_equal(value, reference)
        )
        if not same:
            wrong.append(f"{pytree.keystr(path)}: {np.abs(value.astype('f8') - reference).max()}")
    assert not wrong


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: x + torch.rand(8), "aten.rand"),
        (lambda x: torch.randn_like(x) + x, "aten.randn_like"),
        (lambda x: F.dropout(x, 0.5, training=True), "native_dropout"),
        (lambda x: torch.add(x, x, alpha=2.0), "alpha=2.0"),
        (lambda x: F.avg_pool1d(x, 2) + F.adaptive_max_pool1d(x, 4), "adaptive_max_pool2d"),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), "divisor_override"),
        (lambda x: F.max_pool1d(x, 2, return_indices=True), "int64"),
        (lambda x: x[x > 0], "index"),
        (lambda x: F.interpolate(x[None], scale_factor=1.7, mode="bilinear"), "fractional"),
        (lambda x: F.interpolate(x[None], size=(3, 4), mode="bilinear", antialias=True), "_upsample_bilinear2d_aa"),
        (lambda x: x.half().float(), "float16"),
        (lambda x: x.double().sum(1).float(), "float64"),
        (lambda x: torch.erfc(x), "aten.erfc"),
        (lambda x: torch.cdist(x, x), "_cdist_forward"),
        (lambda x: x.long() / 2, "aten.div"),
    ],
)
def test_an_operator_that_would_be_wrong_is_refused_by_name(function: Callable[[Tensor], Any], operator: str) -> None:
    with pytest.raises(UnsupportedError, match=operator) as caught:
        read_torch(Case(function).eval(), (normal(2, 5, 8),))
    assert "\n" not in str(caught.value)


def test_the_message_names_the_layer_of_an_unknown_operator() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.erfc(x)

    module = nn.Sequential()
    module.add_module("first", nn.Linear(4, 4))
    module.add_module("odd", Odd())
    with pytest.raises(UnsupportedError, match=r"Sequential: operator aten\.erfc\.default .* of module 'odd'"):
        read_torch(module, (normal(2, 4),))
