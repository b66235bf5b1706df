"""CompleteP: a model and AdamW groups written by its table train as ours do; at the base shape nothing is scaled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.prepared import adamw
from support.small_transformer import HEAD_DIM, TOKENS, heads, scaled
from torch import Tensor, nn

RATE, EPS, DECAY, STD = 3e-3, 1e-3, 0.3, 0.05  # an eps as large as gradients are, so that its rule is seen
WIDTH, DEPTH = 16, 2  # the base shape
ALPHA_IN, ALPHA_OUT = 3.0, 0.7
GIVEN = {"base_width": WIDTH, "base_depth": DEPTH, "init_std": STD, "alpha_in": ALPHA_IN, "alpha_out": ALPHA_OUT}


class Reference(nn.Module):
    """The model of the paper's table: W as it is drawn and trained, all multipliers in the forward pass."""

    def __init__(self, net: Any, m_n: float, m_l: float, alpha: float) -> None:
        super().__init__()
        self.net, self.m_n, self.branch = copy.deepcopy(net), m_n, m_l**-alpha
        with torch.no_grad():
            for block in self.net.blocks:  # ours are stored with the factors that were folded into them
                for layer in (block.o, block.down):
                    layer.weight /= self.branch
                block.q.weight *= HEAD_DIM**0.5
            self.net.embedding.weight /= ALPHA_IN
            self.net.readout.weight *= m_n / ALPHA_OUT

    def forward(self, tokens: Tensor) -> Tensor:
        x = ALPHA_IN * self.net.embedding(tokens)
        for b in self.net.blocks:
            h = b.norm1(x)
            q, k, v = heads(b.q(h)), heads(b.k(h)), heads(b.v(h))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / HEAD_DIM)
            x = x + self.branch * b.o(mixed.transpose(-2, -3).flatten(-2))
            x = x + self.branch * b.mlp(b.norm2(x))
        return self.net.readout(self.net.norm(x) * ALPHA_OUT / self.m_n)


def groups(reference: Reference, m_l: float, alpha: float) -> list[dict[str, Any]]:
    """Learning rate, eps and weight decay of each parameter, by the table; lr · decay of gains is η · λ."""
    found = []
    for name, p in reference.net.named_parameters():
        m_n = p.shape[-1] / WIDTH
        in_branch, matrix = "blocks" in name, p.ndim == 2
        hidden = in_branch and matrix
        lr = (m_l ** (alpha - 1) if in_branch else 1.0) / (m_n if hidden else 1.0)
        eps = (m_l**-alpha if in_branch else 1.0) / m_n
        decay = m_n if hidden else m_l ** (1 - alpha) if in_branch else 1.0
        found.append({"params": [p], "lr": RATE * lr, "eps": EPS * eps, "weight_decay": DECAY * decay})
    return found


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 6) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(TOKENS).flatten(0, 1), TOKENS.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("storage", ["folded", "unit"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize(("width", "depth"), [(16, 2), (32, 2), (16, 6), (48, 3)])
def test_it_trains_as_the_table_says(width: int, depth: int, alpha: float, storage: str) -> None:
    hyperparameters = {**GIVEN, "alpha": alpha}
    options = {"scheme": "completep", "lr_units": "umup", "hyperparameters": hyperparameters}
    net, plan = scaled(depth, width, gains=True, storage=storage, **options)
    m_n, m_l = width / WIDTH, depth / DEPTH
    folded, _ = scaled(depth, width, gains=True, storage="folded", **options)
    reference = Reference(folded, m_n, m_l, alpha)
    for layer in (reference.net.embedding, reference.net.readout):
        assert float(layer.weight.detach().square().mean().sqrt()) == pytest.approx(STD)
    q = reference.net.blocks[0].q.weight.detach()
    assert float(q.square().mean().sqrt()) == pytest.approx(STD * m_n**-0.5)
    expected = train(reference, torch.optim.AdamW(groups(reference, m_l, alpha)))
    found = train(net, adamw(net, plan, lr=RATE, weight_decay=DECAY, eps=EPS))
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_rules_are_seen_by_that_test() -> None:
    """Without the rule for eps, or for depth, the losses are others."""
    net, plan = scaled(6, 32, gains=True, scheme="completep", lr_units="umup", hyperparameters=GIVEN)
    reference = Reference(net, 2.0, 3.0, 1.0)
    expected = train(net, adamw(net, plan, lr=RATE, weight_decay=DECAY, eps=EPS))
    for change in ({"eps": EPS}, {"weight_decay": DECAY}, {"lr": RATE}):
        other = copy.deepcopy(reference)
        changed = [{**group, **change} for group in groups(other, 3.0, 1.0)]
        assert train(other, torch.optim.AdamW(changed)) != pytest.approx(expected, rel=1e-6)


def test_the_plan_explains_eps_and_rates() -> None:
    _, plan = scaled(4, 32, scheme="completep", lr_units="umup", hyperparameters={"base_width": WIDTH, "alpha": 0.5})
    text = plan.explain("blocks.0.up.weight")
    assert "m_N^-1, m_N = 32 / 16" in text
    assert "m_L^-0.5, m_L = 4 / 2" in text
