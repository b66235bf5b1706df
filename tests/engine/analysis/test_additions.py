"""Additions inside a branch are part of the residual addition, whatever leaves their sum the same."""

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


class Nested(nn.Module):
    """Blocks with a residual branch inside their branch."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between = between
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.branches = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for branch in self.branches:
            h = F.layer_norm(x, (16,))
            x = x + self.between(h + branch(F.layer_norm(h, (16,))))
        return self.last(x)


def multipliers(between: Callable[[Tensor], Tensor]) -> dict[str, float]:
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    model = Nested(between)
    plan = unit_scale(model, lambda m: F.cross_entropy(m(x), torch.arange(12) % 4), lr_units="umup", verify=False)
    return {name: p.multiplier for name, p in plan.parameters.items()}


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.double().float(),
        lambda x: x.view_as(x),
        Identity.apply,
    ],
    ids=["cast", "view", "identity Function"],
)
def test_what_leaves_a_sum_as_it_is_leaves_the_plan_as_it_is(between: Callable[[Tensor], Tensor]) -> None:
    assert multipliers(between) == pytest.approx(multipliers(lambda x: x))
