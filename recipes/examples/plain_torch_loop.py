"""Unit scaling in a loop of your own: prepare, train, save, and load into a fresh model. No Lightning.

Run it with `python recipes/examples/plain_torch_loop.py`; it takes a few seconds.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_unitscale import load_checkpoint, scale_learning_rates, unit_scale

BYTES = torch.tensor(list(Path(argparse.__file__).read_bytes()))  # the text to learn
LENGTH = 32


class Language(nn.Module):
    """A causal transformer over bytes; nothing in it knows of unit scaling."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0, batch_first=True, norm_first=True)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))

    def forward(self, text: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        x = self.token(text) + self.place(torch.arange(LENGTH))
        logits: Tensor = self.head(self.block(x, mask, is_causal=True))
        return logits  # [batch, LENGTH, 256]


def loss_of(model: nn.Module, seed: int) -> Tensor:
    starts = torch.randint(len(BYTES) - LENGTH, (16,), generator=torch.Generator().manual_seed(seed))
    text = BYTES[starts[:, None] + torch.arange(LENGTH + 1)]
    return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


torch.manual_seed(0)
model = Language()
plan = unit_scale(model, lambda m: loss_of(m, seed=0))  # weights change in place, parameters stay the same objects
print(plan.summary())

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scale_learning_rates(optimizer, plan)  # inside optimizer.step; groups and schedulers keep your values
for step in range(100):
    loss = loss_of(model, step)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with TemporaryDirectory() as folder:
    torch.save(model.state_dict(), f"{folder}/model.pt")  # the plan is in it
    fresh = Language()
    load_checkpoint(fresh, f"{folder}/model.pt")
print(f"another batch: trained {loss_of(model, -1).item():.4f}, loaded {loss_of(fresh, -1).item():.4f}")
