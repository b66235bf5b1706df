"""What every matmul-like function shares: its operands, its fan-in, and how to run it scaled.

A matmul-like function is linear in each of its multiplicands and adds a bias, so with constants `a` for the
multiplicands and `b` for the bias

    scaled(x, w, bias) = a · (x · w) + b · bias,

and its gradients with respect to x and w carry the same `a`, the bias's carries `b`. The constants go into the
products themselves wherever the function has room for them (`addmm(alpha=a, beta=b)`); a factor of 1 costs nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_unitscale.errors import UncastableError
from lightning_unitscale.ops.products import Products

Shape = tuple[int, ...]
Casting = Callable[[Tensor, Tensor, Products], Tensor]  # the product of x and a weight with both cast


class Matmul(ABC):
    """A matmul-like torch function.

    Operands are called by label; those in `bias_labels` are added, the others multiply. The same labels index
    shapes (while planning), values (while recording) and tensors (while running).
    """

    name: str
    bias_labels: frozenset[str] = frozenset()
    uncastable = ""  # why its operands are never cast to a narrow format

    @abstractmethod
    def operands(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The tensor operands by label, in the order of the arguments; absent ones are left out."""

    def is_bias(self, label: str, shape: Shape) -> bool:
        """Whether the operand is added rather than multiplied."""
        return label in self.bias_labels

    @abstractmethod
    def fan_in(self, label: str, shapes: Mapping[str, Shape], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """Number of terms summed into one output element, `label` being the weight."""

    def cast_operands(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], is_weight: Callable[[Any], bool]
    ) -> tuple[Any, Any] | None:
        """The activation and the weight, if the call is the product of just these two; None for any other."""
        found = list(self.multiplicands(args, kwargs).values())
        if self.uncastable or len(found) != 2 or is_weight(found[0]) == is_weight(found[1]):
            return None
        return (found[1], found[0]) if is_weight(found[0]) else (found[0], found[1])

    def multiplicands(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The operands that are multiplied, not added."""
        operands = self.operands(args, kwargs)
        return {label: operand for label, operand in operands.items() if label not in self.bias_labels}

    def products(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Any, weight: Any) -> Products:
        """The bilinear product that the call is; `x` and `weight` need nothing but a shape.

        Raises:
            UncastableError: there is none that knows its adjoints.
        """
        raise UncastableError(f"{self.name} has no product with cast operands")

    def cast(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        x: Tensor,
        weight: Tensor,
        casting: Casting,
        bias_factor: float,
    ) -> Tensor:
        """Run the call with its multiplicands cast; the bias, if there is one, is added as it is."""
        return casting(x, weight, self.products(args, kwargs, x, weight))

    def scaled(
        self,
        function: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        factors: Mapping[str, float],
    ) -> Any:
        """Run `function` with the operands multiplied by their factors (by label; 1 where absent).

        Where the function has no room for the constant it multiplies the output.
        """
        return function(*args, **kwargs) * self.product_factor(factors)

    def product_factor(self, factors: Mapping[str, float]) -> float:
        """The product of the multiplicands' factors."""
        product = 1.0
        for label, factor in factors.items():
            if label not in self.bias_labels:
                product *= factor
        return product


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str, default: Any = None) -> Any:
    """The argument at `position`, or by `name`."""
    return args[position] if len(args) > position else kwargs.get(name, default)


def with_tensors(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], new: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with `new(tensor)` in place of each tensor, in lists too."""

    def replaced(argument: Any) -> Any:
        if isinstance(argument, (list, tuple)) and not isinstance(argument, torch.Size):
            return type(argument)([replaced(item) for item in argument])
        return new(argument) if isinstance(argument, Tensor) else argument

    return tuple(replaced(argument) for argument in args), {name: replaced(value) for name, value in kwargs.items()}


def present(**operands: Any) -> dict[str, Any]:
    """The operands that were given."""
    return {label: operand for label, operand in operands.items() if operand is not None}


def add_bias(product: Tensor, bias: Tensor | None, factor: float) -> Tensor:
    """`product + factor · bias`, in the dtype of the product."""
    return product if bias is None else torch.add(product, bias.to(product.dtype), alpha=factor)
