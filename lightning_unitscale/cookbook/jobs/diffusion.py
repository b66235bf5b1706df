"""Diffusion models on handwritten digits: predicting the noise in an image; scores are mean squared errors.

An image x at time t in [0, 1] is cos(πt/2) · x + sin(πt/2) · ε (Nichol & Dhariwal, arXiv 2102.09672, without offset).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale.cookbook.jobs.job import Batch, Job
from lightning_unitscale.cookbook.jobs.pictures import digit_images


class NoisePredictor(Job):
    """Digits, noised at random times."""

    def examples(self) -> tuple[Tensor, ...]:
        """Images."""
        return (digit_images()[0],)

    @abstractmethod
    def predict(self, noised: Tensor, time: Tensor) -> Tensor:
        """The noise in images [batch, 1, 8, 8] at times [batch]."""

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error of the noise."""
        (images,) = batch
        time, noise = torch.rand(len(images)), torch.randn_like(images)
        angle = (math.pi / 2 * time)[:, None, None, None]
        return F.mse_loss(self.predict(angle.cos() * images + angle.sin() * noise, time), noise)


def time_features(time: Tensor, width: int) -> Tensor:
    """Sines and cosines [batch, width] of times [batch] at frequencies from 1 to 1000."""
    frequencies = torch.logspace(0, 3, width // 2)
    angles = time[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class _TimedBlock(nn.Module):
    """A residual block of a U-Net that is told the time."""

    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(width, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[batch, inputs, h, w] -> [batch, outputs, h, w]."""
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        skip: Tensor = self.shortcut(x)
        out: Tensor = skip + self.conv2(F.silu(self.norm2(h)))
        return out


class DiffusionUNet(NoisePredictor):
    """Convolutions down and up again, with concatenations across."""

    branch_outputs = ("*.conv2",)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        w = self.width
        self.time = nn.Sequential(nn.Linear(w, w), nn.SiLU(), nn.Linear(w, w))
        self.first = nn.Conv2d(1, w, 3, padding=1)
        self.down = nn.ModuleList(_TimedBlock(w, w, w) for _ in range(self.depth))
        self.halve = nn.Conv2d(w, 2 * w, 3, stride=2, padding=1)
        self.middle = nn.ModuleList(_TimedBlock(2 * w, 2 * w, w) for _ in range(self.depth))
        self.widen = nn.ConvTranspose2d(2 * w, w, 2, stride=2)
        self.up = nn.ModuleList(_TimedBlock(2 * w, w, w) for _ in range(self.depth))
        self.norm, self.last = nn.GroupNorm(4, w), nn.Conv2d(w, 1, 3, padding=1)

    def predict(self, noised: Tensor, time: Tensor) -> Tensor:
        """One pass down and up."""
        t = self.time(time_features(time, self.width))
        x, kept = self.first(noised), []
        for block in self.down:
            x = block(x, t)
            kept.append(x)
        x = self.halve(x)
        for block in self.middle:
            x = block(x, t)
        x = self.widen(x)
        for block in self.up:
            x = block(torch.cat([x, kept.pop()], dim=1), t)
        noise: Tensor = self.last(F.silu(self.norm(x)))
        return noise


class _AdaptiveBlock(nn.Module):
    """Attention and MLP with adaLN-zero (Peebles & Xie, arXiv 2212.09748, section 3.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[batch, tokens, width] -> the same."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(time))[:, None].chunk(6, dim=-1)
        h = self.qkv(self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = h.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + gate1 * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = F.gelu(self.up(self.norm2(x) * (1 + scale2) + shift2))
        out: Tensor = x + gate2 * self.down(h)
        return out


class DiT(NoisePredictor):
    """A diffusion transformer on patches of 2×2; its last layer begins at zero."""

    branch_outputs = ("*.proj", "*.down")

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        w = self.width
        self.patches = nn.Conv2d(1, w, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, w))
        self.time = nn.Sequential(nn.Linear(w, w), nn.SiLU(), nn.Linear(w, w))
        self.blocks = nn.ModuleList(_AdaptiveBlock(w, w // 16) for _ in range(self.depth))
        self.norm, self.last = nn.LayerNorm(w), nn.Linear(w, 4)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def predict(self, noised: Tensor, time: Tensor) -> Tensor:
        """Patches in, patches out."""
        x = self.patches(noised).flatten(2).transpose(1, 2) + self.positions
        t = self.time(time_features(time, self.width))
        for block in self.blocks:
            x = block(x, t)
        noise: Tensor = F.pixel_shuffle(self.last(self.norm(x)).transpose(1, 2).unflatten(2, (4, 4)), 2)
        return noise
