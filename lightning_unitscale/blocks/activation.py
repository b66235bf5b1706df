"""f_scaled = f(x) / β, β = max|f(x)| / √n: an activation divided by its own scale, or by a fixed one."""

from __future__ import annotations

from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from lightning_unitscale.blocks.divisor import Scale, check_scale, divisor
from lightning_unitscale.ops.max_scale import Dimensions


def scale_activation(x: Tensor, scale: Scale = None, dim: Dimensions = None, *, detach: bool = False) -> Tensor:
    """x / β.

    Args:
        x: of floating point, any shape.
        scale: β; None: max|x| / √n of x itself, or 1 where that is 0.
        dim: the dimensions that the maximum is taken over, n being the number of elements along them. None: all of x,
            so that each example's result depends on its batch. -1: each position by itself; with one feature that
            leaves nothing but the sign.
        detach: take β for a constant in the backward pass. The gradient is then that of no function: along x itself the
            true one is 0, as the result does not change with the scale of x.

    Raises:
        UnitScalingError: the scale is not above 0, or x has no elements.
    """
    if has_torch_function_unary(x):  # function modes see one call, by its own name
        return handle_torch_function(scale_activation, (x,), x, scale, dim, detach=detach)
    beta = divisor(x, scale, dim, "scale_activation")
    return x / (beta.detach() if detach and isinstance(beta, Tensor) else beta)


class ActivationScaling(nn.Module):
    """`scale_activation` as a module; it has no parameters and no state.

    Args:
        scale, dim, detach: as for `scale_activation`.

    Raises:
        UnitScalingError: the scale is not above 0.
    """

    def __init__(self, scale: Scale = None, dim: Dimensions = None, detach: bool = False) -> None:
        super().__init__()
        check_scale(scale, "ActivationScaling")
        self.scale, self.dim, self.detach = scale, dim, detach

    def forward(self, x: Tensor) -> Tensor:
        """x / β, of the shape of x."""
        return scale_activation(x, self.scale, self.dim, detach=self.detach)

    def extra_repr(self) -> str:
        """As it was made."""
        return f"scale={self.scale}, dim={self.dim}, detach={self.detach}"
