"""Llama in plain PyTorch: the architecture of `transformers` without the code that stops other packages' transforms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainLlama(nn.Module):
    """A causal language model, drawn as `transformers` draws it.

    Args:
        vocabulary: number of tokens.
        width: of the residual stream.
        hidden: width inside the gated MLPs.
        depth: number of blocks.
        heads: of attention, in each block.
        length: of the longest sequence.
    """

    def __init__(self, vocabulary: int, width: int, hidden: int, depth: int, heads: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, hidden, heads, length) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.readout = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [batch, sequence]; result: [batch, sequence, vocabulary]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.readout(self.norm(x))
        return logits


class Block(nn.Module):
    """Pre-norm attention with rotary positions, then a gated MLP."""

    def __init__(self, width: int, hidden: int, heads: int, length: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.head_width = width // heads
        frequencies = 10_000 ** (-torch.arange(0, self.head_width, 2) / self.head_width)
        angles = torch.outer(torch.arange(length), frequencies).repeat(1, 2)  # [length, head_width]
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x and result: [batch, sequence, width]."""
        x = x + self.attend(self.attention_norm(x))
        h = self.mlp_norm(x)
        y: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return y

    def attend(self, h: Tensor) -> Tensor:
        """Causal self-attention."""
        q, k, v = (
            layer(h).unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # [batch, head, sequence, head_width]
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary position embedding."""
        a, b = x.chunk(2, dim=-1)
        length = x.shape[-2]
        return x * self.cos[:length] + torch.cat((-b, a), dim=-1) * self.sin[:length]
