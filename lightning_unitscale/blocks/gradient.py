"""g_scaled = g / γ, γ = max|g| / √d: the identity, whose gradient is divided by its own scale, or by a fixed one.

All that lies before the block gets gradients of another size than those of the loss: they are no longer its slope.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from lightning_unitscale.blocks.divisor import Scale, check_scale, divisor
from lightning_unitscale.ops.max_scale import Dimensions


class _DividedBackward(torch.autograd.Function):
    """Identity forward; backward divides. Its own derivative is again the division, by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Scale, dim: Dimensions) -> Tensor:
        ctx.scale, ctx.dim = scale, dim
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        gamma = divisor(gradient, ctx.scale, ctx.dim, "scale_gradient")
        return gradient / (gamma.detach() if isinstance(gamma, Tensor) else gamma), None, None


def scale_gradient(x: Tensor, scale: Scale = None, dim: Dimensions = None) -> Tensor:
    """x, whose gradient is divided by γ.

    Args:
        x: of floating point, any shape; a parameter, say, or an activation.
        scale: γ; None: max|g| / √d of the gradient that arrives, or 1 where that is 0.
        dim: the dimensions that the maximum is taken over, d being the number of elements along them; None: all.

    Raises:
        UnitScalingError: the scale is not above 0, or x has no elements.
    """
    if has_torch_function_unary(x):  # function modes see one call, by its own name
        return handle_torch_function(scale_gradient, (x,), x, scale, dim)
    check_scale(scale, "scale_gradient")
    if scale is None and x.numel() == 0:
        divisor(x, scale, dim, "scale_gradient")  # raises
    result: Tensor = _DividedBackward.apply(x, scale, dim)  # type: ignore[no-untyped-call]  # torch has no types here
    return result


class GradientScaling(nn.Module):
    """`scale_gradient` as a module; it has no parameters and no state.

    Args:
        scale, dim: as for `scale_gradient`.

    Raises:
        UnitScalingError: the scale is not above 0.
    """

    def __init__(self, scale: Scale = None, dim: Dimensions = None) -> None:
        super().__init__()
        check_scale(scale, "GradientScaling")
        self.scale, self.dim = scale, dim

    def forward(self, x: Tensor) -> Tensor:
        """x itself."""
        return scale_gradient(x, self.scale, self.dim)

    def extra_repr(self) -> str:
        """As it was made."""
        return f"scale={self.scale}, dim={self.dim}"
