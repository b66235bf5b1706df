"""Where will charged particles be? A graph net equivariant to rotations; mean squared error of their displacements."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale.cookbook.jobs.job import Batch, Job

PARTICLES = 5


@cache
def charged_particles(count: int = 1280, steps: int = 20, dt: float = 0.05) -> tuple[Tensor, Tensor, Tensor]:
    """Places [count, PARTICLES, 3] and charges [count, PARTICLES, 1] at rest, and displacements of std 1."""
    generator = torch.Generator().manual_seed(0)
    begin = torch.randn(count, PARTICLES, 3, generator=generator)
    charges = torch.randint(2, (count, PARTICLES, 1), generator=generator) * 2.0 - 1
    places, speeds = begin.clone(), torch.zeros_like(begin)
    for _ in range(steps):
        apart = places[:, :, None] - places[:, None]
        force = charges[:, :, None] * charges[:, None] * apart / (apart.square().sum(-1, keepdim=True) + 0.3) ** 1.5
        speeds = speeds + dt * force.sum(2)
        places = places + dt * speeds
    displacements = places - begin
    return begin, charges, displacements / displacements.std()


class _EquivariantLayer(nn.Module):
    """Equations 3 to 6 of Satorras et al., arXiv 2102.09844."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.edge = nn.Sequential(nn.Linear(2 * width + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        last = nn.Linear(width, 1, bias=False)
        nn.init.xavier_uniform_(last.weight, gain=0.001)
        self.place = nn.Sequential(nn.Linear(width, width), nn.SiLU(), last)
        self.node = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [batch, particles, width] and places [batch, particles, 3] -> the same."""
        apart = x[:, :, None] - x[:, None]
        pairs = [h[:, :, None].expand(-1, -1, PARTICLES, -1), h[:, None].expand(-1, PARTICLES, -1, -1)]
        message = self.edge(torch.cat([*pairs, apart.square().sum(-1, keepdim=True)], dim=-1))
        x = x + (apart * self.place(message)).mean(2)
        return h + self.node(torch.cat([h, message.sum(2)], dim=-1)), x


class ParticleGraph(Job):
    """E(n)-equivariant layers on all pairs."""

    branch_outputs = ("*.node.2",)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.first = nn.Linear(1, self.width)
        self.layers = nn.ModuleList(_EquivariantLayer(self.width) for _ in range(self.depth))

    def examples(self) -> tuple[Tensor, ...]:
        """Places, charges, displacements."""
        return charged_particles()

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error."""
        places, charges, displacements = batch
        h, x = self.first(charges), places
        for layer in self.layers:
            h, x = layer(h, x)
        return F.mse_loss(x - places, displacements)
