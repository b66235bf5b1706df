"""One product of two 2-D operands in narrow formats: on tensor cores where there are any for them, else upcast.

Layouts of `F.scaled_mm(a, b)` on CUDA (cuBLASLt, compute capability 8.9 and 9.0): a row-major, b column-major, the
contracted size and b's columns multiples of 16. Of the three products of a linear layer

    y  = x̂ ŵᵀ     ŵᵀ is column-major as it stands
    gx = ĝ ŵ      ŵ is copied to column-major (one byte an element)
    gW = ĝᵀ x̂     ĝᵀ is copied to row-major, x̂ to column-major

and what is no multiple of 16 is padded with zeros, which add nothing to a product. Only the first may use fast
accumulation: gradients lose too much by it (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). e5m2 times e5m2 has no
kernel and is never asked for: one operand of each product is e4m3.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

ALIGNMENT = 16
_FP8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})


class Cast(NamedTuple):
    """An operand in a narrow format, and what its values have to be multiplied by (0-dim, float32)."""

    values: Tensor
    inverse: Tensor

    def t(self) -> Cast:
        """Transposed."""
        return Cast(self.values.t(), self.inverse)


def multiply(a: Cast, b: Cast, dtype: torch.dtype, *, fast: bool = False) -> Tensor:
    """`a b`, accumulated in float32 or wider, without the scales of its operands.

    Args:
        a: (m, k). b: (k, n).
        dtype: of the result, (m, n).
        fast: whether tensor cores may accumulate in fewer bits.
    """
    if a.values.dtype in _FP8 and has_tensor_cores(a.values.device):
        return _scaled_mm(a, b, dtype, fast)
    if a.values.dtype.itemsize == 2 and a.values.is_cuda:
        wide = torch.mm(a.values, b.values, out_dtype=torch.float32)
    else:
        wide = torch.mm(upcast(a.values, dtype), upcast(b.values, dtype))
    return wide.mul_(a.inverse * b.inverse).to(dtype)


def upcast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers in a dtype that both they and a result of `dtype` fit into, before it is unscaled.

    Never float16: scaled operands make products that it has no room for.
    """
    wide = dtype if values.dtype in _FP8 else torch.promote_types(dtype, values.dtype)
    return values.to(torch.float32 if wide == torch.float16 else wide)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_tensor_cores(device: torch.device) -> bool:
    """Whether the device multiplies FP8; "meta" stands for a CUDA device that does, with all its rules."""
    return _multiplies_fp8(device)


@cache
def _multiplies_fp8(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 9)
    return device.type == "meta"


def padded(size: int) -> int:
    """The next multiple of 16."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _scaled_mm(a: Cast, b: Cast, dtype: torch.dtype, fast: bool) -> Tensor:
    columns = b.values.shape[1]
    left, right = _rows_aligned(a.values), _rows_aligned(b.values.t(), padded(columns)).t()
    product = F.scaled_mm(
        left,
        right,
        a.inverse,
        ScalingType.TensorWise,
        b.inverse,
        ScalingType.TensorWise,
        output_dtype=dtype if dtype != torch.float64 else torch.float32,
        use_fast_accum=fast,
    )
    return product[:, :columns].to(dtype)


def _rows_aligned(matrix: Tensor, rows: int | None = None) -> Tensor:
    """Row-major, its columns a multiple of 16, with `rows` rows; what is added is zero."""
    wanted = (rows or matrix.shape[0], padded(matrix.shape[1]))
    if wanted == tuple(matrix.shape):  # a single row counts as contiguous whatever its strides, by which CUDA goes
        return matrix.contiguous().view(-1).view(wanted)
    aligned = matrix.new_zeros(wanted)
    aligned[: matrix.shape[0], : matrix.shape[1]] = matrix
    return aligned
