"""Recurrent nets, whole and one step at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_unitscale.ops.call import FunctionCall
from lightning_unitscale.ops.matmul import Matmul


class Recurrent(Matmul):
    """`lstm`, `gru`, `rnn_*` and their cells: 2-D parameters multiply, 1-D parameters are biases.

    Operands are called by their position, "2.0" for the first of the list that is argument 2. Fan-in per gate matrix
    is its number of columns. Factors are applied to the weights themselves: one kernel makes all products.
    """

    uncastable = "one kernel makes all its products"

    def operands(self, call: FunctionCall) -> dict[str, Any]:
        found: dict[str, Any] = {"x": call.args[0]}
        for position, item in enumerate(call.args[1:], start=1):
            if isinstance(item, (list, tuple)):
                found |= {f"{position}.{i}": entry for i, entry in enumerate(item) if hasattr(entry, "shape")}
            elif hasattr(item, "shape"):
                found[str(position)] = item
        return found

    def is_bias(self, label: str, operand: Any) -> bool:
        return label != "x" and len(operand.shape) == 1

    def fan_in(self, call: FunctionCall, label: str) -> int:
        return int(self.operands(call)[label].shape[-1])

    def takers(self, call: FunctionCall, of: str | None = None) -> list[tuple[str, ...]]:
        """Of the input: the first layer's input matrices, of both directions. The output is linear in no operand."""
        if of != "x":
            return []
        if self.name.endswith("_cell"):
            return [("2",)]
        position = 2 if isinstance(call.args[2], (list, tuple)) else 3  # packed sequences bring their lengths along
        layers, directions = call.args[position + 2], 1 + call.args[position + 5]
        in_one_layer = len(call.args[position]) // layers
        return [tuple(f"{position}.{i}" for i in range(0, in_one_layer, in_one_layer // directions))]

    def scaled(self, call: FunctionCall, factors: Mapping[str, float]) -> Any:
        def scale(label: str, item: Any) -> Any:
            return item * factors[label] if factors.get(label, 1.0) != 1.0 else item

        scaled = [
            [scale(f"{position}.{i}", entry) for i, entry in enumerate(item)]
            if isinstance(item, (list, tuple))
            else scale(str(position), item)
            for position, item in enumerate(call.args)
        ]
        return call.function(*scaled, **call.kwargs)
