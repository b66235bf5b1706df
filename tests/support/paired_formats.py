"""What a format costs in loss, from many small runs in pairs: `PYTHONPATH=tests python -m support.paired_formats`.

Two runs of one seed that differ by a rounding drift apart as training goes on, so a small cost shows in the mean of
many pairs alone. Here `models` Llama-like models of width 32 are trained side by side, in one batched product for each
layer; no model sees another's numbers but for the scales of casts, which they share. A pair begins with the same
weights and sees the same crops of text, with a format and without.

    python -m support.paired_formats models steps formats seed        # 16 30 fp8,fp8_e4m3,x+weight,gradient 1
"""

from __future__ import annotations

import sys
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale import formats, options, recalibrating, scale_learning_rates, unit_scale
from lightning_unitscale.cookbook.jobs.text import text_crops
from lightning_unitscale.engine.checks.verify_casts import LOW_COSINE

WIDTH, DEPTH, HEADS, LENGTH, ROWS, BYTES, HELD_OUT, RATE = 32, 2, 2, 32, 8, 256, 256, 4e-3
_E4M3, _E5M2, _NONE = torch.float8_e4m3fn, torch.float8_e5m2, torch.float32
OPERANDS_ALONE = {
    "x+weight": (_E4M3, _E4M3, _NONE),
    "x": (_E4M3, _NONE, _NONE),
    "weight": (_NONE, _E4M3, _NONE),
    "gradient": (_NONE, _NONE, _E5M2),
}


class Layer(nn.Module):
    """A linear layer of each model."""

    def __init__(self, models: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(models, inputs, outputs) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


class Block(nn.Module):
    def __init__(self, models: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (Layer(models, WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up = (Layer(models, WIDTH, 3 * WIDTH) for _ in range(2))
        self.down = Layer(models, 3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = F.rms_norm(x, (WIDTH,))
        q, k, v = (
            layer(h).view(-1, LENGTH, HEADS, WIDTH // HEADS).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(x.shape))
        h = F.rms_norm(x, (WIDTH,))
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Models(nn.Module):
    def __init__(self, models: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(models * BYTES, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block(models) for _ in range(DEPTH))
        self.head = Layer(models, WIDTH, BYTES)

    def forward(self, text: Tensor) -> Tensor:
        """text: (models, rows, length); result: logits (models, rows · length, bytes)."""
        models = len(text)
        x = self.embedding(text + BYTES * torch.arange(models)[:, None, None]) + self.position
        x = x.view(models, -1, WIDTH)
        for block in self.blocks:
            x = block(x)
        return self.head(F.rms_norm(x, (WIDTH,)))


def losses(module: nn.Module, crops: Tensor) -> Tensor:
    """Of each model, nats per byte."""
    logits = module(crops[..., :-1])
    each = F.cross_entropy(logits.flatten(0, 1), crops[..., 1:].reshape(-1), reduction="none")
    return each.view(len(crops), -1).mean(1)


def held_out(models: int, steps: int, format: str | None, seed: int) -> Tensor:
    """The losses of each model after training; Adam, a rate that rises over a tenth and falls to 0."""
    crops = text_crops(LENGTH + 1)
    train, kept = crops[:-HELD_OUT], crops[-HELD_OUT:]
    torch.manual_seed(seed)
    module, generator = Models(models), torch.Generator().manual_seed(seed)

    def batch() -> Tensor:
        return train[torch.randint(len(train), (models, ROWS), generator=generator)]

    first = batch()
    plan = unit_scale(module, lambda m: losses(m, first).mean(), format=format)
    optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    scale_learning_rates(optimizer, plan)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(10 * step / steps, 1) * (1 - (step - 1) / steps)
        with recalibrating(plan, step):
            optimizer.zero_grad()
            losses(module, batch()).mean().backward()
        optimizer.step()
    with torch.no_grad():
        found = [losses(module, rows.expand(models, -1, -1)) for rows in kept.split(ROWS)]
    return torch.stack(found).mean(0)


def main(models: int, steps: int, names: list[str], seed: int) -> None:
    for name, numbers in OPERANDS_ALONE.items():
        formats.FORMATS[name], LOW_COSINE[name] = formats.Format(name, *numbers), 0.9
    options.FORMAT_NAMES = (*options.FORMAT_NAMES, *OPERANDS_ALONE)
    plain = held_out(models, steps, None, seed)
    print(f"no format: {plain.mean():.4f} nats per byte, {models} models, {steps} steps", flush=True)
    for name in names:
        more = held_out(models, steps, name, seed) - plain
        error = more.std() / sqrt(models)
        print(
            f"{name}: {more.mean():+.5f} ± {error:.5f} ({more.mean() / plain.mean():+.3%} ± {error / plain.mean():.3%})"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(","), int(sys.argv[4]))
