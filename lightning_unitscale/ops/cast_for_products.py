"""An operand of three products, cast: in two layouts where tensor cores read two, in two roundings where blocks of it
have scales of their own, else as it stands.

Each of x, w and g goes into two of the three products (`multiply`): as rows into the first, as columns into the second.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_unitscale.block_formats import BlockNumbers, Nvfp4, in_groups, rotated
from lightning_unitscale.formats import Format, cast
from lightning_unitscale.ops.fp8_cast import FP8, fp8_cast
from lightning_unitscale.ops.multiply import ALIGNMENT, has_tensor_cores
from lightning_unitscale.ops.products import BatchedProducts, GroupedProducts, MatrixProducts, Products


class CastOperand(NamedTuple):
    """A cast operand, both of the operand's own orientation; empty where nobody asked for it.

    Attributes:
        first: row-major, for the product that contracts its columns.
        second: column-major, for the product that contracts its rows.
    """

    first: Tensor
    second: Tensor


def cast_for_products(
    tensor: Tensor,
    operand: str,
    format: Format,
    scales: tuple[Tensor, Tensor],
    products: Products,
    *,
    forward: bool = True,
    backward: bool = True,
) -> CastOperand:
    """Cast an operand, reading it once.

    Args:
        operand: "x", "weight" or "gradient".
        scales: for its first product and for its second, see `Scales.of`.
        products: that it goes into.
        forward, backward: which of its two products will be made; of x and of a weight the first is the forward pass's.
    """
    numbers = format.numbers(operand)
    if isinstance(numbers, BlockNumbers):
        first, second = _in_blocks(tensor * scales[0], operand, numbers, products, forward, backward)
        return CastOperand(first.bfloat16(), second.bfloat16())  # which holds every number of these formats
    if isinstance(products, MatrixProducts) and numbers in FP8 and has_tensor_cores(tensor.device):
        rows, columns, _ = fp8_cast(
            tensor, scales[0], numbers, rows=forward, columns=backward, alignment=ALIGNMENT, column_scale=_other(scales)
        )
        return CastOperand(rows, columns.t())
    first = cast(tensor, numbers, scales[0])
    return CastOperand(first, first if _other(scales) is None or not backward else cast(tensor, numbers, scales[1]))


def _other(scales: tuple[Tensor, Tensor]) -> Tensor | None:
    """The second of two scales, if it is another."""
    return None if scales[1] is scales[0] else scales[1]


def _in_blocks(
    tensor: Tensor, operand: str, numbers: BlockNumbers, products: Products, forward: bool, backward: bool
) -> tuple[Tensor, Tensor]:
    """Blocks lie along what a product sums over, so the second rounding is another than the first.

    The gradient is rounded at random, weights in squares, and what is summed over in the weight's gradient is rotated,
    where the format's paper does so (`block_formats`). Not rotated are the pixels of a convolution, whose windows
    overlap, and groups of rows, which would have to be filled up.
    """
    first_dim, second_dim = products.summed_over(operand)
    if isinstance(numbers, Nvfp4) and operand == "weight":
        squares = numbers.rounded_in_squares(tensor, (first_dim, second_dim))
        return squares, squares
    rounded = numbers.rounded_at_random if operand == "gradient" else numbers.rounded
    first = second = tensor.new_empty(0)
    if forward:
        first = rounded(tensor, first_dim)
    if backward and isinstance(products, GroupedProducts) and operand != "weight":
        second = in_groups(tensor, products.ends, numbers.size, lambda rows: rounded(rows, 0))
    elif backward:
        is_rotated = isinstance(numbers, Nvfp4) and isinstance(products, MatrixProducts | BatchedProducts)
        second = rounded(rotated(tensor, second_dim) if is_rotated else tensor, second_dim)
    return first, second
