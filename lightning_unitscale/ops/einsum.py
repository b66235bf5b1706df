"""`torch.einsum`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from lightning_unitscale.errors import UncastableError
from lightning_unitscale.ops.call import FunctionCall
from lightning_unitscale.ops.matmul import Matmul
from lightning_unitscale.ops.products import EinsumProducts, Products


class Einsum(Matmul):
    """`torch.einsum(equation, *operands)` in the string form; operands are called "0", "1", …"""

    def operands(self, call: FunctionCall) -> dict[str, Any]:
        args = call.args
        tensors = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
        return {str(position): tensor for position, tensor in enumerate(tensors)}

    def fan_in(self, call: FunctionCall, label: str) -> int:
        """The product of the sizes of the operand's indices that are summed over."""
        return prod(self._summed(call, label).values())

    def fan_ins(self, call: FunctionCall, weights: Sequence[str]) -> dict[str, int]:
        """An index that two weights sum over is the later one's, as in one matmul after the other."""
        found: dict[str, int] = {}
        counted: set[str] = set()
        for label in reversed(weights):
            sizes = self._summed(call, label)
            found[label] = prod(size for letter, size in sizes.items() if letter not in counted)
            counted |= sizes.keys()
        return found

    def _summed(self, call: FunctionCall, label: str) -> dict[str, int]:
        """The sizes of the operand's indices that are summed over."""
        terms, output = self._equation(call)
        term, shape = terms[int(label)], self.operands(call)[label].shape
        before, dots, after = term.partition("...")
        sizes = dict(zip(before, shape, strict=False))
        if dots:
            sizes |= dict(zip(reversed(after), reversed(shape), strict=False))
        return {letter: size for letter, size in sizes.items() if letter not in output}

    def products(self, call: FunctionCall, x: Any, weight: Any) -> Products:
        equation = str(call.args[0]).replace(" ", "")
        if "->" not in equation or "." in equation:
            raise UncastableError(f"the equation {equation!r} does not name all indices")
        terms, output = self._equation(call)
        position = next(int(label) for label, operand in self.operands(call).items() if operand is x)
        x_term, weight_term = terms[position], terms[1 - position]
        for term, others in ((x_term, weight_term + output), (weight_term, x_term + output)):
            if len(set(term)) < len(term) or not set(term) <= set(others):
                raise UncastableError(f"the equation {equation!r} repeats an index, or sums over one of a single term")
        return EinsumProducts(x_term, weight_term, output)

    @staticmethod
    def _equation(call: FunctionCall) -> tuple[list[str], str]:
        """The terms of the operands, and that of the output; where it is left out, all indices that occur once."""
        inputs, arrow, output = str(call.args[0]).replace(" ", "").partition("->")
        if not arrow:
            letters = inputs.replace(",", "").replace(".", "")
            output = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
        return inputs.split(","), output
