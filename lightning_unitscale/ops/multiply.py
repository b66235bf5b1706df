"""One product of two 2-D operands in narrow formats: on tensor cores where there are any for them, else upcast.

Layouts of `F.scaled_mm(a, b)` on CUDA (cuBLASLt, compute capability 8.9 and 9.0): a row-major, b column-major, the
contracted size and b's columns multiples of 16. So each operand of the three products of a linear layer

    y  = x̂ ŵᵀ     x̂ as rows, ŵ as rows (ŵᵀ is column-major as it stands)
    gx = ĝ ŵ      ĝ as rows, ŵ as columns
    gW = ĝᵀ x̂     ĝ as columns, x̂ as columns

is read in both layouts, which `fp8_cast` writes in one pass, padded with zeros, which add nothing to a product. Only
the first product may use fast accumulation: gradients lose too much by it (DeepSeek-V3, arXiv 2412.19437, section
3.3.2). e5m2 times e5m2 has no kernel and is never asked for: one operand of each product is e4m3.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from lightning_unitscale.ops.fp8_cast import FP8

ALIGNMENT = 16


class Cast(NamedTuple):
    """An operand in a narrow format.

    Attributes:
        values: of a 2-D operand perhaps with zeros beyond its `shape`.
        inverse: what they have to be multiplied by; float32, 0-dim or, of a 2-D operand, (rows, 1) or (1, columns).
    """

    values: Tensor
    inverse: Tensor
    shape: torch.Size

    def t(self) -> Cast:
        """Transposed."""
        return Cast(self.values.t(), self.inverse.t(), self.shape[::-1])


def multiply(a: Cast, b: Cast, dtype: torch.dtype, *, fast: bool = False) -> Tensor:
    """`a b`, accumulated in float32 or wider, without the scales of its operands.

    Args:
        a: (m, k). b: (k, n).
        dtype: of the result, (m, n).
        fast: whether tensor cores may accumulate in fewer bits.
    """
    if a.values.dtype in FP8 and has_tensor_cores(a.values.device):
        return _scaled_mm(a, b, dtype, fast)
    if a.values.dtype.itemsize == 2 and a.values.is_cuda:
        wide = torch.mm(a.values, b.values, out_dtype=torch.float32)
    else:
        wide = torch.mm(upcast(a.values, dtype), upcast(b.values, dtype))
    return _unscaled(wide, a, b).to(dtype)


def _unscaled(product: Tensor, a: Cast, b: Cast) -> Tensor:
    """In place; exact, as the scales are powers of two."""
    if a.inverse.dim() == b.inverse.dim() == 0:
        return product.mul_(a.inverse * b.inverse)
    return product.mul_(a.inverse).mul_(b.inverse)


def upcast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers in a dtype that both they and a result of `dtype` fit into, before it is unscaled.

    Never float16: scaled operands make products that it has no room for.
    """
    wide = dtype if values.dtype in FP8 else torch.promote_types(dtype, values.dtype)
    return values.to(torch.float32 if wide == torch.float16 else wide)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch has no types here
def has_tensor_cores(device: torch.device) -> bool:
    """Whether the device multiplies FP8; "meta" stands for a CUDA device that does, with all its rules."""
    return _multiplies_fp8(device)


@cache
def _multiplies_fp8(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 9)
    return device.type == "meta"


def _scaled_mm(a: Cast, b: Cast, dtype: torch.dtype, fast: bool) -> Tensor:
    rows, columns = a.shape[0], b.shape[1]
    if 0 in (*a.shape, columns):
        return a.values.new_zeros((rows, columns), dtype=dtype)
    wide = dtype if dtype != torch.float64 else torch.float32
    if a.inverse.dim() == b.inverse.dim() == 0:
        scales, scaling = (a.inverse, b.inverse), ScalingType.TensorWise
    elif wide == torch.bfloat16:  # which is all that kernels with scales of rows give
        padding = b.values.shape[1] - columns
        of_rows = a.inverse.expand(rows, 1).flatten().unsqueeze(1)
        of_columns = F.pad(b.inverse.expand(1, columns).flatten(), (0, padding), value=1.0).unsqueeze(0)
        scales, scaling = (of_rows, of_columns), ScalingType.RowWise
    else:
        one = torch.ones((), device=a.values.device)
        scales, scaling = (one, one), ScalingType.TensorWise
    product = F.scaled_mm(
        a.values[:rows], b.values, scales[0], scaling, scales[1], scaling, output_dtype=wide, use_fast_accum=fast
    )[:, :columns]
    if scaling == ScalingType.TensorWise and scales[0] is not a.inverse:
        product = _unscaled(product, a, b)
    return product.to(dtype)
