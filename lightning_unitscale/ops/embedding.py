"""Lookups: the rows are scaled, never the table."""

from __future__ import annotations

from lightning_unitscale.ops.call import FunctionCall
from lightning_unitscale.ops.matmul import Matmul


class Embedding(Matmul):
    """`F.embedding(indices, weight)` and `F.embedding_bag`."""

    uncastable = "a lookup makes no product"
    is_lookup = True

    def fan_in(self, call: FunctionCall, label: str) -> int:
        return 1
