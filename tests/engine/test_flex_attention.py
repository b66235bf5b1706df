"""`flex_attention` is attention like any other: the plan and the function of `scaled_dot_product_attention`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lightning_unitscale import Plan, unit_scale

TOKENS = torch.arange(24).reshape(2, 12) % 7


class Attention(nn.Module):
    """Causal self-attention over 12 tokens, queries and keys of one matrix."""

    def __init__(self, flex: bool, mask: BlockMask, capped: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.flex, self.mask, self.capped = flex, mask, capped

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.flex:
            cap = (lambda score, *_: 2 * (score / 2).tanh()) if self.capped else None
            return flex_attention(q, k, v, score_mod=cap, block_mask=self.mask)
        if not self.capped:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        logits = 2 * (q @ k.mT * 8**-0.5 / 2).tanh()
        return logits.masked_fill(~torch.ones(12, 12).tril().bool(), float("-inf")).softmax(-1) @ v


class Model(nn.Module):
    """Two blocks."""

    def __init__(self, flex: bool, capped: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 12, 12, device="cpu")
        self.embed, self.head = nn.Embedding(7, 16), nn.Linear(16, 7)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.blocks = nn.ModuleList(Attention(flex, mask, capped) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x)


@pytest.fixture(autouse=True)
def _code_compiled_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def prepared(flex: bool, storage: str, capped: bool = False) -> tuple[Model, Plan]:
    model = Model(flex, capped)
    plan = unit_scale(model, lambda m: F.cross_entropy(m(TOKENS).transpose(1, 2), TOKENS), storage=storage)
    return model, plan


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_plan_and_function_are_those_of_attention_spelled_otherwise(storage: str, capped: bool) -> None:
    (model, plan), (other, expected) = prepared(True, storage, capped), prepared(False, storage, capped)
    for name, parameter in plan.parameters.items():
        assert parameter.multiplier == pytest.approx(expected.parameters[name].multiplier), name
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), other(TOKENS))  # flex_attention compiles itself
        torch.testing.assert_close(torch.compile(model, backend="eager")(TOKENS), other(TOKENS))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_training_on_a_cpu_is_refused_by_torch_as_it_was() -> None:
    model, _ = prepared(True, "folded")
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        model(TOKENS)
