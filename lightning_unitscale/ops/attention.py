"""Attention: `F.scaled_dot_product_attention`, and the composite behind `nn.MultiheadAttention`."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_unitscale.ops.matmul import Matmul, Shape, argument, present


class DotProductAttention(Matmul):
    """`F.scaled_dot_product_attention(query, key, value, …, scale=None)`; None means d_head^-½."""

    uncastable = "attention's own products"
    name = "scaled_dot_product_attention"

    def operands(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        names = ("query", "key", "value")
        return present(**{name: argument(args, kwargs, i, name) for i, name in enumerate(names)})

    def fan_in(self, label: str, shapes: Mapping[str, Shape], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        return shapes["query"][-1]

    def scaled(
        self,
        function: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        factors: Mapping[str, float],
    ) -> Tensor:
        """A learned query, key or value is multiplied itself; `scaled_logits` takes the factor of the logits."""
        operands = self.operands(args, kwargs)
        scaled = {name: operand * factors.get(name, 1.0) for name, operand in operands.items()}
        rest = {name: value for name, value in kwargs.items() if name not in scaled}
        rest |= dict(zip(("attn_mask", "dropout_p", "is_causal"), args[3:], strict=False))
        return function(**scaled, **rest)

    @staticmethod
    def scaled_logits(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], a: float) -> Any:
        """The same attention with its logits multiplied by `a`: free, as the function has a `scale`."""
        query = argument(args, kwargs, 0, "query")
        own = argument(args, kwargs, 6, "scale")
        kwargs = dict(kwargs)
        kwargs["scale"] = a * (query.shape[-1] ** -0.5 if own is None else own)
        return function(*args[:6], **kwargs)

    @staticmethod
    def without_dropout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the same attention, so that two runs can be compared."""
        if len(args) > 4:
            return (*args[:4], 0.0, *args[5:]), kwargs
        return args, {**kwargs, "dropout_p": 0.0}


# `F.multi_head_attention_forward` hides its projections from a function mode by handing itself over whole.
# This is the same code with that one check answered "no", so that the calls inside are seen.
open_multi_head_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.__dict__, "has_torch_function": lambda _: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)
open_multi_head_attention.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__
