"""Attention: `F.scaled_dot_product_attention`, and the composite behind `nn.MultiheadAttention`."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_unitscale.ops.matmul import Matmul, Shape, argument, present


class DotProductAttention(Matmul):
    """`F.scaled_dot_product_attention(query, key, value, …, scale=None)`; None means d_head^-½."""

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
        raise TypeError("attention has no weight of its own; its logits are scaled by `scaled_logits`")

    @staticmethod
    def scaled_logits(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], a: float) -> Any:
        """The same attention with its logits multiplied by `a`: free, as the function has a `scale`."""
        query = argument(args, kwargs, 0, "query")
        own = argument(args, kwargs, 6, "scale")
        kwargs = dict(kwargs)
        kwargs["scale"] = a * (query.shape[-1] ** -0.5 if own is None else own)
        return function(*args[:6], **kwargs)


_torch_in_projection_packed: Callable[..., Sequence[Tensor]] = F.__dict__["_in_projection_packed"]


def _in_projection_packed(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Sequence[Tensor]:
    """torch's own, but for self-attention: that one calls a Python method which the compiler can't trace in a mode."""
    if query is key and key is value:
        return [part.contiguous() for part in F.linear(query, weight, bias).chunk(3, dim=-1)]
    return _torch_in_projection_packed(query, key, value, weight, bias)


# `F.multi_head_attention_forward` hides its projections from a function mode by handing itself over whole.
# This is the same code with that one check answered "no", so that the calls inside are seen.
open_multi_head_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.__dict__, "has_torch_function": lambda _: False, "_in_projection_packed": _in_projection_packed},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)
open_multi_head_attention.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__
