"""A transformer of any width and depth, in float64, small enough to write out by hand what a scheme makes of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale import Plan, unit_scale

VOCAB, HEAD_DIM = 11, 8
TOKENS = torch.arange(24).reshape(2, 12) * 7 % VOCAB


def norm(x: Tensor) -> Tensor:
    """RMS 1 in each position."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-30)


def heads(x: Tensor) -> Tensor:
    """(batch, position, feature) → (batch, head, position, feature)."""
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(-2, -3)


class Block(nn.Module):
    """Attention and a gated mlp; `post` puts a norm at the end of each branch (res-post-norm) in place of the first."""

    def __init__(self, width: int, gains: bool, post: bool) -> None:
        super().__init__()
        self.post = post
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)
        self.norm1, self.norm2 = (nn.RMSNorm(width, eps=1e-30, elementwise_affine=gains) for _ in range(2))

    def attention(self, h: Tensor) -> Tensor:
        q, k, v = heads(self.q(h)), heads(self.k(h)), heads(self.v(h))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2))

    def mlp(self, h: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(h)) * self.up(h))

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = x + self.norm1(self.attention(x))
            return x + self.norm2(self.mlp(x))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Embedding, blocks, readout; weights are those of torch's initialisation but for the embedding's std of 0.02."""

    def __init__(self, depth: int, width: int = 16, gains: bool = False, post: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, gains, post) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-30, elementwise_affine=gains)
        self.readout = nn.Linear(width, VOCAB, bias=False)
        self.double()

    def stream(self, tokens: Tensor) -> Tensor:
        """The residual stream behind the last block."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        return self.readout(self.norm(self.stream(tokens)))


def loss(net: nn.Module) -> Tensor:
    """Each token's own number, from the tokens up to it."""
    return F.cross_entropy(net(TOKENS).flatten(0, 1), TOKENS.flatten())


def scaled(depth: int, width: int = 16, gains: bool = False, post: bool = False, **options: Any) -> tuple[Any, Plan]:
    """A transformer under a plan; options as for `unit_scale`."""
    net = Transformer(depth, width, gains, post)
    return net, unit_scale(net, loss, **{"verify": False, **options})
