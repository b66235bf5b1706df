"""What a cast to a narrow format does to a tensor, as sums that add up over tensors and processes.

Of the finite elements x, with kept = cast(x · s) / s:

    squares Σ x²    non_zero Σ [x ≠ 0]    flushed Σ [kept = 0 ≠ x]    saturated Σ [|x · s| > the format's largest]
    errors Σ (kept − x)²    fourth_powers Σ x⁴    largest max |x|      and non_finite, the number of all others
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_unitscale.block_formats import BlockNumbers
from lightning_unitscale.formats import Numbers, cast, range_of

SUMS = ("squares", "non_zero", "flushed", "saturated", "errors", "non_finite", "fourth_powers", "largest")


def cast_sums(tensor: Tensor, numbers: Numbers, scale: Tensor | float) -> Tensor:
    """The numbers above in the order of `SUMS`: float64, on the tensor's device.

    Args:
        tensor: of any floating-point dtype.
        numbers: what it is cast to; blocks lie along its last dimension.
        scale: s, a power of two.
    """
    if tensor.numel() == 0:
        return torch.zeros(len(SUMS), dtype=torch.float64, device=tensor.device)
    finite = tensor.isfinite()
    values = torch.where(finite, tensor, 0).float()
    squares = values.square().sum()
    if isinstance(numbers, BlockNumbers):
        kept = numbers.rounded(torch.atleast_1d(values * scale)).view(values.shape) / scale
    else:
        kept = cast(values, numbers, scale).float() / scale
    mean_square = (squares / values.numel()).double()
    relative = torch.where(squares > 0, values / mean_square.sqrt().float(), 0.0)  # no under- or overflow
    sums = (
        squares,
        (values != 0).sum(),
        ((kept == 0) & (values != 0)).sum(),
        ((values * scale).abs() > range_of(numbers).largest).sum(),
        (kept - values).square().sum(),
        (~finite).sum(),
        relative.square().square().sum().double() * mean_square.square(),
        values.abs().max(),
    )
    return torch.stack([number.double() for number in sums])
