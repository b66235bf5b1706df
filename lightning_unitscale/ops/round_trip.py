"""Operands cast to a narrow format and back, for functions that have no kernel in it.

    x̂ = cast(x · s) / s      in the forward pass; the gradient of x is that of x̂
    ĝ = cast(g · s) / s      in the backward pass; the value stays

Dividing by a power of two is exact, and the compute dtype holds every number of the narrow format, so a product of
rounded operands is the product in the narrow format up to the order of accumulation. It saves neither time nor memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_unitscale.formats import cast
from lightning_unitscale.ops.cast_product import refuse_second_derivative


def round_trip(tensor: Tensor, dtype: torch.dtype, scale: Tensor | float) -> Tensor:
    """What a cast to `dtype`, times a power of two, leaves of a tensor, in the tensor's own dtype."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return (cast(tensor, dtype, scale).to(wide) / scale).to(tensor.dtype)


class Rounded(torch.autograd.Function):
    """`round_trip`, seen by autograd as the identity."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dtype: torch.dtype, scale: Tensor) -> Tensor:
        return round_trip(tensor, dtype, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


class RoundedGradient(torch.autograd.Function):
    """The identity, with `round_trip` on its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dtype: torch.dtype, scale: Tensor) -> Tensor:
        ctx.dtype = dtype
        ctx.save_for_backward(scale)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative()
        (scale,) = ctx.saved_tensors
        return round_trip(gradients[0], ctx.dtype, scale), None, None
