"""An operand of three products, cast: in two layouts where tensor cores read two, else as it stands.

Each of x, w and g goes into two of the three products (`multiply`): as rows into the first, as columns into the second.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_unitscale.formats import cast
from lightning_unitscale.ops.fp8_cast import FP8, fp8_cast
from lightning_unitscale.ops.multiply import ALIGNMENT, has_tensor_cores
from lightning_unitscale.ops.products import MatrixProducts, Products


class Narrow(NamedTuple):
    """A cast operand, both of the operand's own orientation; empty where nobody asked for it.

    Attributes:
        first: row-major, for the product that contracts its columns.
        second: column-major, for the product that contracts its rows.
    """

    first: Tensor
    second: Tensor


def narrow(
    tensor: Tensor,
    dtype: torch.dtype,
    scale: Tensor,
    products: Products,
    *,
    forward: bool = True,
    backward: bool = True,
) -> Narrow:
    """Cast an operand, reading it once.

    Args:
        products: that it goes into.
        forward, backward: which of its two products will be made; of x and of a weight the first is the forward pass's.
    """
    if isinstance(products, MatrixProducts) and dtype in FP8 and has_tensor_cores(tensor.device):
        rows, columns, _ = fp8_cast(tensor, scale, dtype, rows=forward, columns=backward, alignment=ALIGNMENT)
        return Narrow(rows, columns.t())
    values = cast(tensor, dtype, scale)
    return Narrow(values, values)
