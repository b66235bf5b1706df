"""Is a matrix like one whose elements were drawn at random?

What an initialiser draws has no structure beyond its distribution: shuffled, its largest singular value stays what it
is, whatever it was drawn from (uniform, normal, truncated, sparse). Training adds the same few directions over and
over, and σ₁ rises above that of the shuffled matrix:

    z = (σ₁(W) - mean σ₁(shuffled W)) / std σ₁(shuffled W)

Drawn matrices have |z| of 3 to 4 at most, orthogonal ones and identities far below 0. Of large matrices a part is
looked at: a part of what is drawn is drawn too.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHUFFLES = 16
LARGEST, SMALLEST = 128, 16  # rows and columns looked at; smaller matrices show nothing


def structure(weight: Tensor) -> float | None:
    """z of the weight, as a matrix with one row for each output; None if it is too small, or all one number."""
    generator = torch.Generator().manual_seed(0)  # the same on every process, and no one else's numbers
    part = _part(_as_matrix(weight.detach()), generator)
    if part is None or bool((part == part[0, 0]).all()):
        return None
    elements = part.flatten()
    orders = [torch.randperm(len(elements), generator=generator) for _ in range(SHUFFLES)]
    shuffled = _largest_singular_value(torch.stack([elements[order].view_as(part) for order in orders]))
    mean, std = float(shuffled.mean()), float(shuffled.std())
    return (float(_largest_singular_value(part)) - mean) / max(std, 1e-6 * mean)


def _as_matrix(weight: Tensor) -> Tensor:
    if weight.dim() == 3 and min(weight.shape[1:]) >= SMALLEST:
        return weight[0]  # one expert's
    return weight.reshape(weight.shape[0], -1)


def _part(matrix: Tensor, generator: torch.Generator) -> Tensor | None:
    if min(matrix.shape) < SMALLEST or matrix.is_complex() or matrix.is_meta:
        return None
    rows, columns = (torch.randperm(size, generator=generator)[:LARGEST].to(matrix.device) for size in matrix.shape)
    part = matrix[rows][:, columns].cpu().double()
    return part if bool(part.isfinite().all()) else None


def _largest_singular_value(matrices: Tensor) -> Tensor:
    gram = matrices @ matrices.mT if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT @ matrices
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues[..., -1].clamp(min=0).sqrt()
