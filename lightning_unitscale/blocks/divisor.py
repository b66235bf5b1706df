"""What a block divides by: a fixed number, or the article's rule, max|t| / √n of the tensor itself."""

from __future__ import annotations

from math import isfinite

from torch import Tensor

from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.ops.max_scale import Dimensions, max_scale

Scale = float | None


def check_scale(scale: Scale, block: str) -> None:
    """
    Raises:
        UnitScalingError: the scale is neither None nor a positive number.
    """
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not isfinite(scale) or scale <= 0:
        raise UnitScalingError(
            f"{block}: scale={scale!r} must be a number above 0, which the tensor is divided by, or None for the "
            "article's rule, max|t| / √n."
        )


def divisor(tensor: Tensor, scale: Scale, dim: Dimensions, block: str) -> Tensor | float:
    """The fixed scale, or that of the tensor.

    Raises:
        UnitScalingError: the tensor is not of floating point, or has no elements to find a scale of.
    """
    check_scale(scale, block)
    if not tensor.is_floating_point():
        raise UnitScalingError(f"{block}: a tensor of {tensor.dtype} can't be divided by a scale; cast it first.")
    if scale is not None:
        return scale
    if tensor.numel() == 0:
        raise UnitScalingError(
            f"{block}: a tensor of shape {list(tensor.shape)} has no elements, so max|t| / √n does not exist; give a "
            "fixed scale, or leave it out."
        )
    return max_scale(tensor, dim)
