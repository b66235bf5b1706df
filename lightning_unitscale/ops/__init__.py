"""The matmul-like functions, by short name."""

from lightning_unitscale.ops.attention import DotProductAttention
from lightning_unitscale.ops.linear import AddMm, Bilinear, Einsum, GroupedProduct, Linear, Product
from lightning_unitscale.ops.matmul import Matmul
from lightning_unitscale.ops.weights import RECURRENT_OPS, Convolution, Embedding

MATMULS: dict[str, Matmul] = {
    op.name: op
    for op in (
        Linear(),
        AddMm("addmm"),
        AddMm("baddbmm"),
        *(Product(name) for name in ("matmul", "rmatmul", "mm", "bmm", "mv", "inner")),
        GroupedProduct(),
        Einsum(),
        Bilinear(),
        *(Convolution(f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3)),
        *RECURRENT_OPS,
        Embedding("embedding"),
        Embedding("embedding_bag"),
        DotProductAttention(),
    )
}

__all__ = ["MATMULS", "Matmul"]
