"""No form of attention stops the planner: what it does not understand is left alone, and both storages agree."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale import unit_scale

Weights = Callable[["Attention", Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Attention whose probabilities are given."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights, self.before, self.head = weights, nn.Linear(5, 8), nn.Linear(8, 2)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.table, self.gain = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.ones(()))
        self.register_buffer("constant", torch.randn(4, 4))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        return self.head(h + self.weights(self, self.q(h), self.k(h)) @ self.v(h))


WEIGHTS: dict[str, Weights] = {
    "einsum of one": lambda m, q, k: torch.einsum("nqd->nqd", q @ k.mT).softmax(-1),
    "einsum of one summed": lambda m, q, k: torch.einsum("nqd->nq", q)[..., None].expand(3, 4, 4).softmax(-1),
    "einsum of three": lambda m, q, k: torch.einsum("nqd,nkd,nkd->nqk", q, k, k.tanh()).softmax(-1),
    "einsum of a list": lambda m, q, k: torch.einsum("nqd,nkd->nqk", [q, k]).softmax(-1),
    "einsum of sublists": lambda m, q, k: torch.einsum(q, [0, 1, 2], k, [0, 3, 2], [0, 1, 3]).softmax(-1),
    "einsum without output": lambda m, q, k: torch.einsum("aqd,akd", q, k).softmax(-1)[:3, None].expand(3, 4, 4),
    "booleans": lambda m, q, k: ((q > 0).double() @ (k > 0).double().mT).softmax(-1),
    "integers": lambda m, q, k: ((q > 0).long() @ (k > 0).long().mT).double().softmax(-1),
    "integers and a float": lambda m, q, k: (q @ (k > 0).to(q).mT).softmax(-1),
    "baddbmm onto a scalar": lambda m, q, k: torch.baddbmm(q.new_zeros(()), q, k.mT).softmax(-1),
    "baddbmm onto a learned scalar": lambda m, q, k: torch.baddbmm(m.gain, q, k.mT, alpha=0.3).softmax(-1),
    "baddbmm onto nothing": lambda m, q, k: torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0).softmax(-1),
    "a product with a constant": lambda m, q, k: (q[..., :4] @ m.constant).softmax(-1),
    "a parameter with a constant": lambda m, q, k: (m.table @ m.constant).softmax(-1).expand(3, 4, 4),
    "a parameter alone": lambda m, q, k: m.table.softmax(-1).expand(3, 4, 4),
    "a parameter with an activation": lambda m, q, k: (m.table @ q[..., :4]).softmax(-1),
    "a product of products": lambda m, q, k: ((q @ k.mT) @ (k @ q.mT)).softmax(-1),
    "a product with itself": lambda m, q, k: (q @ q.mT).softmax(-1),
    "a learned temperature": lambda m, q, k: (m.gain * (q @ k.mT)).softmax(-1),
    "logits squared": lambda m, q, k: (q @ k.mT).square().softmax(-1),
    "logits of a product of vectors": lambda m, q, k: (q[:, :, None] @ k[:, :, :, None]).squeeze(-1).expand(3, 4, 4),
    "addbmm": lambda m, q, k: torch.addbmm(m.table, q, k.mT).softmax(-1).expand(3, 4, 4),
    "chain_matmul": lambda m, q, k: torch.linalg.multi_dot([q[0], k[0].T, m.constant]).softmax(-1).expand(3, 4, 4),
    "masked by a parameter": lambda m, q, k: F.scaled_dot_product_attention(q, k, k, m.table)[..., :4].softmax(-1),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_planned_or_left_alone(name: str) -> None:
    torch.manual_seed(1)
    x, found = torch.randn(3, 4, 5, dtype=torch.float64), []
    for storage in ("folded", "unit"):
        model = Attention(WEIGHTS[name])
        unit_scale(model, lambda m: m(x).square().mean(), storage=storage)
        found.append(model(x))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)
