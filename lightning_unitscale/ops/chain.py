"""`torch.linalg.multi_dot`: several matrices multiplied in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_unitscale.ops.call import FunctionCall
from lightning_unitscale.ops.matmul import Matmul


class Chain(Matmul):
    """A product of matrices, `A₀ A₁ … Aₙ`; operands are called "0", "1", …"""

    uncastable = "a product of several matrices in one call"

    def operands(self, call: FunctionCall) -> dict[str, Any]:
        return {str(position): matrix for position, matrix in enumerate(call.argument(0, "tensors"))}

    def fan_in(self, call: FunctionCall, label: str) -> int:
        return self.fan_ins(call, [label])[label]

    def fan_ins(self, call: FunctionCall, weights: Sequence[str]) -> dict[str, int]:
        """As in one matmul after the other: right of the activation a weight sums over rows, left over columns."""
        operands = self.operands(call)
        activation = next((position for position, label in enumerate(operands) if label not in weights), -1)
        return {label: int(operands[label].shape[0 if int(label) > activation else -1]) for label in weights}
