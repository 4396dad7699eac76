"""A small encoder with attention, layer norms and a head: what a float model's kernels add up."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the network is made by PyTorch: pip install torch")

SHAPE = (1, 24, 16)  # tokens that fill no whole vectors


class Encoder(torch.nn.Module):
    """One layer of four heads; ``forward`` takes ``x`` of ``SHAPE``."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        linear, norm = torch.nn.Linear, torch.nn.LayerNorm
        self.enter, self.head = linear(SHAPE[2], width), linear(width, 10)
        self.q, self.k, self.v, self.out = (linear(width, width) for _ in range(4))
        self.up, self.down = linear(width, 2 * width), linear(2 * width, width)
        self.norm, self.last_norm = norm(width), norm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        heads = (each(x).unflatten(2, (4, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        found = torch.nn.functional.scaled_dot_product_attention(*heads)
        x = self.norm(self.out(found.transpose(1, 2).flatten(2)) + x)
        x = self.last_norm(self.down(torch.nn.functional.gelu(self.up(x))) + x)
        return self.head(x)
