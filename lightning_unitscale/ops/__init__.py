"""The matmul-like functions, by short name: one row for each."""

from collections.abc import Callable
from typing import Any

import torch
from torch._higher_order_ops.flex_attention import flex_attention as flex_operator

from lightning_unitscale.ops.attention import DotProductAttention
from lightning_unitscale.ops.call import FunctionCall
from lightning_unitscale.ops.chain import Chain
from lightning_unitscale.ops.convolution import Convolution
from lightning_unitscale.ops.einsum import Einsum
from lightning_unitscale.ops.embedding import Embedding
from lightning_unitscale.ops.flex_attention import FlexAttention
from lightning_unitscale.ops.linear import (
    AddMm,
    Bilinear,
    GroupedProduct,
    InnerProduct,
    Linear,
    Product,
)
from lightning_unitscale.ops.matmul import Matmul
from lightning_unitscale.ops.recurrent import Recurrent
from lightning_unitscale.ops.torch_functions import functions_by_name

MATMULS: dict[str, Matmul] = {
    op.name: op
    for op in (
        Linear("linear", x="input", weight="weight", bias="bias"),
        AddMm("addmm", bias="input", left="mat1", right="mat2"),
        AddMm("baddbmm", bias="input", left="batch1", right="batch2", is_batched=True),
        Product("matmul", left="input", right="other", is_batched=True),
        Product("rmatmul", right="input", left="other", is_batched=True),
        Product("mm", left="input", right="mat2"),
        Product("bmm", left="input", right="mat2", is_batched=True),
        Product("mv", left="input", right="vec"),
        InnerProduct("inner", left="input", right="other"),
        GroupedProduct("_grouped_mm", left="input", right="mat2"),
        Einsum("einsum", is_batched=True),
        Chain("linalg_multi_dot"),
        Bilinear("bilinear", x="input1", y="input2", weight="weight", bias="bias"),
        *(
            Convolution(f"conv{kind}{n}d", x="input", weight="weight", bias="bias")
            for kind in ("", "_transpose")
            for n in (1, 2, 3)
        ),
        *(Recurrent(f"{kind}{cell}") for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for cell in ("", "_cell")),
        Embedding("embedding", indices="input", weight="weight"),
        Embedding("embedding_bag", indices="input", weight="weight"),
        DotProductAttention("scaled_dot_product_attention", query="query", key="key", value="value"),
        FlexAttention("flex_attention", flex_operator, query="query", key="key", value="value"),
    )
}


def is_lookup(name: str) -> bool:
    """Whether a function of this short name takes rows of its weight: a tied weight is used both ways."""
    return name in MATMULS and MATMULS[name].is_lookup


def is_attention(name: str) -> bool:
    """Whether a function of this short name is all of attention."""
    return name in MATMULS and MATMULS[name].is_attention


# Operators that libraries call in compiled code where their eager code calls torch's function, by its short name.
COMPILED_FOR = {"_grouped_mm": ("transformers", "grouped_mm_fallback")}


def functions_named(name: str) -> tuple[Callable[..., Any], ...]:
    """Every function of this short name that a function mode can see."""
    own = MATMULS[name].functions if name in MATMULS else ()
    library, operator = COMPILED_FOR.get(name, ("", ""))
    registered = getattr(getattr(torch.ops, library), operator, None) if library else None
    if "." in name:  # an operator, as TorchScript calls those of torch, or of a library
        *namespace, packet, overload = name.split(".")
        registered = getattr(getattr(getattr(torch.ops, *(namespace or ["aten"])), packet, None), overload, None)
    return (*functions_by_name().get(name, ()), *own, *([registered] if registered is not None else []))


__all__ = ["MATMULS", "FunctionCall", "Matmul", "functions_named", "is_attention", "is_lookup"]
