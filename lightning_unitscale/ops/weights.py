"""Functions whose weights are small beside their activations: convolutions, recurrent nets, plain parameter uses.

Here the factor is applied to the weight itself, `f(x, a · W)`. Autograd then scales the gradient of the stored
weight by the same `a`. The scaled copy is as large as the weight, which for a convolution is far smaller than
its activations, the only other place where the factor could go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from torch import Tensor

from lightning_unitscale.errors import UncastableError
from lightning_unitscale.ops.matmul import Casting, Matmul, Shape, add_bias, argument, present
from lightning_unitscale.ops.products import ConvolutionProducts, Products
from lightning_unitscale.ops.torch_functions import RECURRENT


class Convolution(Matmul):
    """`conv1d/2d/3d` and `conv_transpose1d/2d/3d`.

    Fan-in of a convolution is C_in/groups · ∏kernel; each output of a transposed one receives
    C_in/groups · ∏kernel/∏stride terms.
    """

    bias_labels = frozenset({"bias"})

    def __init__(self, name: str) -> None:
        self.name = name
        self.transposed = "transpose" in name

    def operands(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        names = {"x": "input", "weight": "weight", "bias": "bias"}
        return present(**{label: argument(args, kwargs, i, name) for i, (label, name) in enumerate(names.items())})

    def fan_in(self, label: str, shapes: Mapping[str, Shape], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        channels, *kernel = shapes["weight"][1:]
        if not self.transposed:
            return channels * prod(kernel)
        groups = argument(args, kwargs, 6, "groups", 1)
        stride = argument(args, kwargs, 3, "stride", 1)
        strides: int = prod(stride) if isinstance(stride, (tuple, list)) else stride ** len(kernel)
        return max(1, int(shapes["weight"][0] // groups * prod(kernel) // strides))

    def products(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Any, weight: Any) -> Products:
        kernel = tuple(weight.shape[2:])

        def numbers(conv: int, transposed: int, name: str, default: int) -> tuple[int, ...]:
            given = argument(args, kwargs, transposed if self.transposed else conv, name, default)
            if isinstance(given, int):
                return (given,) * len(kernel)
            return tuple(given) * len(kernel) if len(given) == 1 else tuple(given)

        dilation = numbers(5, 7, "dilation", 1)
        padding = argument(args, kwargs, 4, "padding", 0)
        if isinstance(padding, str):
            wide = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
            if any(width % 2 for width in wide):
                raise UncastableError("padding='same' with a kernel of even size")
            paddings = tuple(width // 2 for width in wide)
        else:
            paddings = numbers(4, 4, "padding", 0)
        return ConvolutionProducts(
            stride=numbers(3, 3, "stride", 1),
            padding=paddings,
            dilation=dilation,
            groups=argument(args, kwargs, 6, "groups", 1),
            transposed=self.transposed,
            output_padding=numbers(5, 5, "output_padding", 0) if self.transposed else (0,) * len(kernel),
        )

    def cast(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        x: Tensor,
        weight: Tensor,
        casting: Casting,
        bias_factor: float,
    ) -> Tensor:
        products = self.products(args, kwargs, x, weight)
        if x.dim() < weight.dim():  # one sample without a batch dimension
            y = casting(x.unsqueeze(0), weight, products).squeeze(0)
        else:
            y = casting(x, weight, products)
        bias = argument(args, kwargs, 2, "bias")
        return add_bias(y, None if bias is None else bias.reshape(-1, *[1] * (weight.dim() - 2)), bias_factor)

    def scaled(
        self,
        function: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        factors: Mapping[str, float],
    ) -> Tensor:
        operands = self.operands(args, kwargs)
        weight = operands["weight"] * self.product_factor(factors)
        bias = operands["bias"] * factors.get("bias", 1.0) if "bias" in operands else None
        rest = {name: value for name, value in kwargs.items() if name not in ("input", "weight", "bias")}
        return function(operands["x"], weight, bias, *args[3:], **rest)


class Recurrent(Matmul):
    """`lstm`, `gru`, `rnn_*` and their cells: 2-D parameters multiply, 1-D parameters are biases.

    Fan-in per gate matrix is its number of columns.
    """

    uncastable = "one kernel makes all its products"

    def __init__(self, name: str) -> None:
        self.name = name

    def operands(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"x": args[0]}
        for position, item in enumerate(args[1:], start=1):
            if isinstance(item, (list, tuple)):
                found |= {f"{position}.{i}": entry for i, entry in enumerate(item) if hasattr(entry, "shape")}
            elif hasattr(item, "shape"):
                found[str(position)] = item
        return found

    def is_bias(self, label: str, shape: Shape) -> bool:
        return label != "x" and len(shape) == 1

    def fan_in(self, label: str, shapes: Mapping[str, Shape], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        return shapes[label][-1]

    def scaled(
        self,
        function: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        factors: Mapping[str, float],
    ) -> Any:
        def scale(label: str, item: Any) -> Any:
            return item * factors[label] if factors.get(label, 1.0) != 1.0 else item

        scaled = [
            [scale(f"{position}.{i}", entry) for i, entry in enumerate(item)]
            if isinstance(item, (list, tuple))
            else scale(str(position), item)
            for position, item in enumerate(args)
        ]
        return function(*scaled, **kwargs)


class Embedding(Matmul):
    """`F.embedding(indices, weight)` and `F.embedding_bag`: the rows are scaled, never the table."""

    uncastable = "a lookup makes no product"

    def __init__(self, name: str) -> None:
        self.name = name

    def operands(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return present(indices=argument(args, kwargs, 0, "input"), weight=argument(args, kwargs, 1, "weight"))

    def fan_in(self, label: str, shapes: Mapping[str, Shape], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        return 1


RECURRENT_OPS = tuple(Recurrent(name) for name in RECURRENT)
