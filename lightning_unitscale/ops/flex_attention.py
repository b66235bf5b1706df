"""`torch.nn.attention.flex_attention`: attention with logits and mask made by functions of the caller's.

What a function mode sees is the operator that it ends in. It has the scale of the logits as an argument, before the
caller's function of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.attention import flex_attention as frontend

from lightning_unitscale.ops.attention import DotProductAttention
from lightning_unitscale.ops.call import FunctionCall


class FlexAttention(DotProductAttention):
    """`flex_attention(query, key, value, score_mod, block_mask, scale, …)`, which also gives statistics back."""

    def logit_scale(self, call: FunctionCall) -> Any:
        return call.argument(5, "scale")

    def logit_bias(self, call: FunctionCall) -> Any:
        return None  # what a function of the caller's adds is not seen

    def scaled_logits(self, call: FunctionCall, a: float, query: int | None) -> Any:
        return call.function(*call.args[:5], a * call.args[5], *call.args[6:])

    def without_dropout(self, call: FunctionCall) -> FunctionCall:
        return call


@contextmanager
def gradients_on_every_device() -> Iterator[None]:
    """Let uncompiled `flex_attention` run where torch has no kernel for its gradients.

    On a CPU torch refuses inputs that require some. Uncompiled the operator is plain matrix products, gradients
    included; so a model can be prepared there that will train on a GPU.
    """
    refuse: Callable[..., None] = frontend._validate_device
    frontend._validate_device = lambda *_: None
    try:
        yield
    finally:
        frontend._validate_device = refuse
