"""A parameter that the plan leaves alone because the recorded step had no use for it is named when it learns."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_unitscale import scale_learning_rates, unit_scale

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.other = nn.Linear(4, 16), nn.Linear(16, 4), nn.Linear(16, 3)

    def forward(self, x: Tensor, use_other: bool = False) -> Tensor:
        h = F.relu(self.body(x))
        return self.other(h)[:, :3] if use_other else self.head(h)


def prepared(net: Net, **options: object) -> torch.optim.Optimizer:
    plan = unit_scale(net, lambda m: F.cross_entropy(m(X), Y), **options)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    scale_learning_rates(optimizer, plan)
    return optimizer


def step(net: Net, optimizer: torch.optim.Optimizer, use_other: bool = False) -> list[str]:
    """The warnings of one step."""
    optimizer.zero_grad()
    F.cross_entropy(net(X, use_other), Y % 3).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(warning.message) for warning in caught]


def test_the_head_of_a_loss_that_comes_later_is_named_once() -> None:
    net = Net()
    optimizer = prepared(net)
    assert not step(net, optimizer)
    (message,) = step(net, optimizer, use_other=True)
    assert "other.weight" in message and "skip" in message
    assert not step(net, optimizer, use_other=True)


def test_a_layer_unfrozen_later_is_named_once() -> None:
    net = Net()
    net.body.requires_grad_(False)
    optimizer = prepared(net)
    assert not step(net, optimizer)
    net.body.requires_grad_(True)
    (message,) = step(net, optimizer)
    assert "body.weight (frozen)" in message and "skip" in message
    assert not step(net, optimizer)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_listed_in_skip_is_not_warned_of(frozen: bool) -> None:
    net = Net()
    net.other.requires_grad_(not frozen)
    optimizer = prepared(net, skip=["other"])
    net.other.requires_grad_(True)
    assert not step(net, optimizer, use_other=True)


def test_a_closure_is_looked_at_after_it_ran() -> None:
    net = Net()
    optimizer = prepared(net)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(X, use_other=True), Y % 3)
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match=r"other\.weight"):
        optimizer.step(closure)
