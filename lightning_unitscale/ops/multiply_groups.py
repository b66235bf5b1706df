"""The products of groups of rows with a matrix each, in FP8 on tensor cores.

`torch._scaled_grouped_mm(a, b, scale_a, scale_b, ends)` takes e4m3 alone, a row-major, each of b's matrices
column-major, both contracted and output sizes multiples of 16, one scale a row of a and a column of b, and gives
bfloat16; it has kernels for compute capability 9.0. So it makes

    y  = x̂ ŵ        always, if the sizes fit: x's rows are in groups of any size
    gx = ĝ ŵᵀ       where gradients are e4m3 (`format="fp8_e4m3"`); ŵᵀ is copied to column-major
    gw = x̂ᵀ ĝ       never: it sums over each group, which would have to begin and end at multiples of 16

and the others are made of upcast operands.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lightning_unitscale.ops.multiply import ALIGNMENT, Cast


def multiplies_groups(a: Cast, b: Cast, dtype: torch.dtype) -> bool:
    """Whether `multiply_groups` can make the product of a: (n, k) and b: (groups, k, m)."""
    return (
        a.values.dtype == b.values.dtype == torch.float8_e4m3fn
        and dtype == torch.bfloat16
        and not any(size % ALIGNMENT for size in b.shape[1:])
        and a.shape[0] > 0
        and _has_kernel(a.values.device)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch has no types here
def _has_kernel(device: torch.device) -> bool:
    return _is_hopper(device)


@cache
def _is_hopper(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.version.cuda is not None and torch.cuda.get_device_capability(device) == (9, 0)
    return device.type == "meta"  # which has the rules of CUDA


def multiply_groups(a: Cast, b: Cast, ends: Tensor, *, fast: bool = False) -> Tensor:
    """Each group of a's rows times its own matrix of b, without the scales of the operands.

    Args:
        a: (n, k).
        b: (groups, k, m).
        ends: where each group of rows ends; int32.
        fast: whether tensor cores may accumulate in fewer bits.

    Returns:
        (n, m) in bfloat16.
    """
    groups, _, columns = b.shape
    right = b.values if b.values.stride(-2) == 1 else b.values.mT.contiguous().mT
    product: Tensor = torch._scaled_grouped_mm(
        a.values.contiguous(),
        right,
        a.inverse.expand(a.shape[0]).contiguous(),
        b.inverse.expand(groups, columns).contiguous(),
        offs=ends,
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )
    return product
