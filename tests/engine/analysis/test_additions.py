"""Parallel branches are branches of the one addition, whatever leaves their sum the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale import unit_scale


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


class Parallel(nn.Module):
    """Two branches of each block, summed before they are added to the stream."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between = between
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.branches = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for one, other in zip(self.branches[::2], self.branches[1::2], strict=True):
            h = F.layer_norm(x, (16,))
            x = x + self.between(one(h) + other(h))
        return self.last(x)


def multipliers(between: Callable[[Tensor], Tensor]) -> dict[str, float]:
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    model = Parallel(between)
    plan = unit_scale(model, lambda m: F.cross_entropy(m(x), torch.arange(12) % 4), lr_units="umup", verify=False)
    return {name: p.multiplier for name, p in plan.parameters.items()}


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.contiguous(),
        lambda x: x.double().float(),
        lambda x: x.view_as(x),
        lambda x: F.dropout(x, 0.0),
        Identity.apply,
    ],
    ids=["contiguous", "cast", "view", "dropout", "identity Function"],
)
def test_what_leaves_a_sum_of_branches_as_it_is_leaves_the_plan_as_it_is(between: Callable[[Tensor], Tensor]) -> None:
    assert multipliers(between) == pytest.approx(multipliers(lambda x: x))
