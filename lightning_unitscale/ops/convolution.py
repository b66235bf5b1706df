"""Convolutions and transposed convolutions.

The factor is applied to the weight itself, `f(x, a · W)`. Autograd then scales the gradient of the stored weight by
the same `a`. The scaled copy is as large as the weight, which is far smaller than the activations, the only other
place where the factor could go.

A convolution whose kernel is one pixel is a product of matrices with a row for each pixel. With its operands cast it is
made as one where tensor cores multiply the format and pixels lie in memory as such rows (`channels_last`); elsewhere
bringing them into rows would cost what the product saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor

from lightning_unitscale.errors import UncastableError
from lightning_unitscale.ops.call import FunctionCall
from lightning_unitscale.ops.matmul import Casting, Matmul, add_bias
from lightning_unitscale.ops.multiply import has_tensor_cores
from lightning_unitscale.ops.products import ConvolutionProducts, MatrixProducts


class Convolution(Matmul):
    """`conv1d/2d/3d` and `conv_transpose1d/2d/3d`.

    Fan-in of a convolution is C_in/groups · ∏kernel; each output of a transposed one receives
    C_in/groups · ∏kernel/∏stride terms.
    """

    @property
    def transposed(self) -> bool:
        return "transpose" in self.name

    def fan_in(self, call: FunctionCall, label: str) -> int:
        weight = self.operands(call)["weight"]
        channels, *kernel = weight.shape[1:]
        if not self.transposed:
            return int(channels * prod(kernel))
        groups = call.argument(6, "groups", 1)
        stride = call.argument(3, "stride", 1)
        strides: int = prod(stride) if isinstance(stride, (tuple, list)) else stride ** len(kernel)
        return max(1, int(weight.shape[0] // groups * prod(kernel) // strides))

    def products(self, call: FunctionCall, x: Any, weight: Any) -> ConvolutionProducts:
        kernel = tuple(weight.shape[2:])

        def numbers(conv: int, transposed: int, name: str, default: int) -> tuple[int, ...]:
            given = call.argument(transposed if self.transposed else conv, name, default)
            if isinstance(given, int):
                return (given,) * len(kernel)
            return tuple(given) * len(kernel) if len(given) == 1 else tuple(given)

        dilation = numbers(5, 7, "dilation", 1)
        padding = call.argument(4, "padding", 0)
        if isinstance(padding, str):
            wide = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
            if any(width % 2 for width in wide):
                raise UncastableError("padding='same' with a kernel of even size")
            paddings = tuple(width // 2 for width in wide)
        else:
            paddings = numbers(4, 4, "padding", 0)
        return ConvolutionProducts(
            kernel=kernel,
            stride=numbers(3, 3, "stride", 1),
            padding=paddings,
            dilation=dilation,
            groups=call.argument(6, "groups", 1),
            transposed=self.transposed,
            output_padding=numbers(5, 5, "output_padding", 0) if self.transposed else (0,) * len(kernel),
        )

    def cast(self, call: FunctionCall, x: Tensor, weight: Tensor, casting: Casting, bias_factor: float) -> Tensor:
        products = self.products(call, x, weight)
        rows = _rows_of_pixels(x) if products.is_of_pixels and x.dim() == weight.dim() else None
        if rows is not None and has_tensor_cores(x.device):
            y = casting(rows, weight.flatten(1), MatrixProducts())
            y = y.view(x.shape[0], *x.shape[2:], -1).movedim(-1, 1)
        elif x.dim() < weight.dim():  # one sample without a batch dimension
            y = casting(x.unsqueeze(0), weight, products).squeeze(0)
        else:
            y = casting(x, weight, products)
        bias = call.argument(2, "bias")
        return add_bias(y, None if bias is None else bias.reshape(-1, *[1] * (weight.dim() - 2)), bias_factor)

    def scaled(self, call: FunctionCall, factors: Mapping[str, float]) -> Any:
        operands = self.operands(call)
        weight = operands["weight"] * self.product_factor(factors)
        bias = operands["bias"] * factors.get("bias", 1.0) if "bias" in operands else None
        rest = {name: value for name, value in call.kwargs.items() if name not in self.arguments.values()}
        return call.function(operands["x"], weight, bias, *call.args[3:], **rest)


def _rows_of_pixels(x: Tensor) -> Tensor | None:
    """(pixels, channels), if x: (n, channels, …) lies in memory so."""
    last = x.movedim(1, -1)
    return last.view(-1, x.shape[1]) if last.is_contiguous() else None
