"""Attention: `F.scaled_dot_product_attention`, and the composite behind `nn.MultiheadAttention`."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F

from lightning_unitscale.ops.call import FunctionCall
from lightning_unitscale.ops.matmul import Matmul


class DotProductAttention(Matmul):
    """`F.scaled_dot_product_attention(query, key, value, …, scale=None)`; None means d_head^-½."""

    uncastable = "attention's own products"
    is_attention = True

    def fan_in(self, call: FunctionCall, label: str) -> int:
        return int(self.operands(call)["query"].shape[-1])

    def takers(self, call: FunctionCall, of: str | None = None) -> list[tuple[str, ...]]:
        """The output is linear in the value, the logits in query and key."""
        others = {None: "value", "query": "key", "key": "query"}
        return [(others[of],)] if of in others else []

    def query_and_key(self, call: FunctionCall) -> tuple[Any, Any]:
        operands = self.operands(call)
        return operands["query"], operands["key"]

    def logit_scale(self, call: FunctionCall) -> Any:
        return call.argument(6, "scale")

    def logit_bias(self, call: FunctionCall) -> Any:
        return call.argument(3, "attn_mask")

    def scaled(self, call: FunctionCall, factors: Mapping[str, float]) -> Any:
        """A learned query, key or value is multiplied itself; `scaled_logits` takes the factor of the logits."""
        scaled = {label: operand * factors.get(label, 1.0) for label, operand in self.operands(call).items()}
        rest = {name: value for name, value in call.kwargs.items() if name not in scaled}
        return call.function(*scaled.values(), *call.args[3:], **rest)

    def scaled_logits(self, call: FunctionCall, a: float, query: int | None) -> Any:
        """Free, as the function has a `scale`."""
        own = self.logit_scale(call)
        scale = a * (self.fan_in(call, "query") ** -0.5 if own is None else own)
        return call.function(*call.args[:6], **{**call.kwargs, "scale": scale})

    def without_dropout(self, call: FunctionCall) -> FunctionCall:
        if len(call.args) > 4:
            return FunctionCall(call.function, (*call.args[:4], 0.0, *call.args[5:]), call.kwargs)
        return FunctionCall(call.function, call.args, {**call.kwargs, "dropout_p": 0.0})


# `F.multi_head_attention_forward` hides its projections from a function mode by handing itself over whole.
# This is the same code with that one check answered "no", so that the calls inside are seen.
open_multi_head_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.__dict__, "has_torch_function": lambda _: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)
open_multi_head_attention.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__
