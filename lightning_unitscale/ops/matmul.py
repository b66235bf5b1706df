"""What every matmul-like function shares: its operands, its fan-in, and how to run it scaled.

A matmul-like function is linear in each of its multiplicands and adds a bias, so with constants `a` for the
multiplicands and `b` for the bias

    scaled(x, w, bias) = a · (x · w) + b · bias,

and its gradients with respect to x and w carry the same `a`, the bias's carries `b`. The constants go into the
products themselves wherever the function has room for them (`addmm(alpha=a, beta=b)`); a factor of 1 costs nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_unitscale.errors import UncastableError
from lightning_unitscale.ops.call import FunctionCall
from lightning_unitscale.ops.products import Products

Casting = Callable[[Tensor, Tensor, Products], Tensor]  # the product of x and a weight with both cast


class Matmul(ABC):
    """A matmul-like torch function.

    Operands are called by label; "bias" is added, the others multiply. Questions about a call are the same whether
    its operands are tensors (while running) or recorded values (while planning): they need nothing but a shape.

    Args:
        name: its short name, see `torch_functions`.
        functions: its functions beside those that torch itself has by that name (a kernel of one's own).
        is_batched: both operands may have batch dimensions, as queries and keys do.
        arguments: what torch calls the operands, by label, in the order of its arguments.

    Attributes:
        uncastable: why its operands are never cast to a narrow format.
        is_lookup: it takes rows of its weight, and makes no product.
        is_attention: it is all of attention, softmax included.
        output_dim: of a weight that is a matrix, the dimension whose size is that of the output.
    """

    uncastable = ""
    is_lookup = False
    is_attention = False
    output_dim = 0

    def __init__(self, name: str, *functions: Callable[..., Any], is_batched: bool = False, **arguments: str) -> None:
        self.name, self.functions, self.is_batched, self.arguments = name, functions, is_batched, arguments

    def operands(self, call: FunctionCall) -> dict[str, Any]:
        """The tensor operands by label, in the order of the arguments; absent ones are left out."""
        found = {}
        for position, (label, name) in enumerate(self.arguments.items()):
            operand = call.argument(position, name)
            if operand is not None:
                found[label] = operand
        return found

    def is_bias(self, label: str, operand: Any) -> bool:
        """Whether the operand is added rather than multiplied."""
        return label == "bias"

    def multiplicands(self, call: FunctionCall) -> dict[str, Any]:
        """The operands that are multiplied, not added."""
        return {label: operand for label, operand in self.operands(call).items() if not self.is_bias(label, operand)}

    @abstractmethod
    def fan_in(self, call: FunctionCall, label: str) -> int:
        """Number of terms summed into one output element, `label` being the weight."""

    def fan_ins(self, call: FunctionCall, weights: Sequence[str]) -> dict[str, int]:
        """The fan-in of each weight, where one call has these; what two of them sum over together counts once."""
        return {label: self.fan_in(call, label) for label in weights}

    # --- where a constant of a tensor may stand instead ----------------------------------------------------------

    def takers(self, call: FunctionCall, of: str | None = None) -> list[tuple[str, ...]]:
        """The ways in which operands can take a constant of the operand `of`, or of the output.

        The labels of one way take it together: of what is multiplied one alone, of what is added all.
        """
        if of is None:
            biases = [label for label, operand in self.operands(call).items() if self.is_bias(label, operand)]
            return [(label, *biases) for label in self.multiplicands(call)]
        factors = self.multiplicands(call)
        return [(label,) for label in factors if label != of] if of in factors else []

    # --- scaled ------------------------------------------------------------------------------------------------

    def scaled(self, call: FunctionCall, factors: Mapping[str, float]) -> Any:
        """Run the call with the operands multiplied by their factors (by label; 1 where absent).

        Where the function has no room for the constant it multiplies the output.
        """
        return call.run() * self.product_factor(factors)

    def product_factor(self, factors: Mapping[str, float]) -> float:
        """The product of the multiplicands' factors."""
        product = 1.0
        for label, factor in factors.items():
            if label != "bias":
                product *= factor
        return product

    # --- as a part of attention --------------------------------------------------------------------------------

    def query_and_key(self, call: FunctionCall) -> tuple[Any, Any]:
        """The two operands whose product attention logits are."""
        query, key = list(self.multiplicands(call).values())[-2:]
        return query, key

    def logit_scale(self, call: FunctionCall) -> Any:
        """The caller's own factor of the logits; None where the function has none, or takes its default."""
        return None

    def logit_bias(self, call: FunctionCall) -> Any:
        """What the function itself adds to the logits; None for nothing."""
        return None

    def scaled_logits(self, call: FunctionCall, a: float, query: int | None) -> Any:
        """Run the call with its logits multiplied by `a`, where the query is the argument at this position."""
        if query is None:
            return call.run() * a
        args = call.args
        return call.function(*args[:query], args[query] * a, *args[query + 1 :], **call.kwargs)

    def without_dropout(self, call: FunctionCall) -> FunctionCall:
        """The same call, such that two runs can be compared."""
        return call

    # --- with operands in narrow formats -----------------------------------------------------------------------

    def cast_operands(self, call: FunctionCall, is_weight: Callable[[Any], bool]) -> tuple[Any, Any] | None:
        """The activation and the weight, if the call is the product of just these two; None for any other."""
        found = list(self.multiplicands(call).values())
        if self.uncastable or len(found) != 2 or is_weight(found[0]) == is_weight(found[1]):
            return None
        return (found[1], found[0]) if is_weight(found[0]) else (found[0], found[1])

    def products(self, call: FunctionCall, x: Any, weight: Any) -> Products:
        """The bilinear product that the call is; `x` and `weight` need nothing but a shape.

        Raises:
            UncastableError: there is none that knows its adjoints.
        """
        raise UncastableError(f"{self.name} has no product with cast operands")

    def cast(self, call: FunctionCall, x: Tensor, weight: Tensor, casting: Casting, bias_factor: float) -> Tensor:
        """Run the call with its multiplicands cast; the bias, if there is one, is added as it is."""
        return casting(x, weight, self.products(call, x, weight))


def add_bias(product: Tensor, bias: Tensor | None, factor: float) -> Tensor:
    """`product + factor · bias`, in the dtype of the product."""
    return product if bias is None else torch.add(product, bias.to(product.dtype), alpha=factor)
