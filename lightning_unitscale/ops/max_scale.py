"""The scale of a tensor by its largest element.

    scale(t) = max|t| / √n        n elements along the dimensions that the maximum is taken over

t / scale(t) has a largest magnitude of √n, as n elements of RMS 1 have if all their energy is in one of them. A tensor
that is all zero has no scale of this kind and is left alone: its divisor is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

Dimensions = int | Sequence[int] | None


def max_scale(tensor: Tensor, dim: Dimensions = None) -> Tensor:
    """max|t| / √n of a tensor, differentiable; 1 where all is zero.

    Args:
        tensor: of floating point.
        dim: one scale for each place along the other dimensions, which is kept with size 1; None: one scale, 0-dim, of
            the whole tensor.
    """
    dims = [dim] if isinstance(dim, int) else dim
    n = tensor.numel() if dims is None else prod([tensor.shape[d] for d in dims])
    largest = tensor.abs().amax() if dims is None else tensor.abs().amax(tuple(dims), keepdim=True)
    return torch.where(largest == 0, 1.0, largest / n**0.5)
