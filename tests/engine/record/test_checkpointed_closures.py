"""A checkpointed function that is no method is run again outside every frame: no factor, and exact gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_unitscale import unit_scale

WIDTH = 8
Run = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
WAYS: dict[str, Run] = {
    "plain": lambda function, x: function(x),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not reentrant": partial(checkpoint, use_reentrant=False),
}
X = torch.randn(4, 6, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Closures that use weights of their module directly, add to the stream, and have activations."""

    def __init__(self, inner: Run, outer: Run) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = inner, outer
        self.first, self.layer, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        def inside(x: Tensor) -> Tensor:
            return x + torch.relu(F.linear(F.layer_norm(x, (WIDTH,)), self.weight))

        def around(x: Tensor) -> Tensor:
            return x + torch.relu(self.layer(self.inner(inside, x)))

        return self.last(self.outer(around, self.first(x))).square().mean()


def gradients(net: Net) -> dict[str, Tensor]:
    net(X).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("storage", ["folded", "unit"])
@pytest.mark.parametrize("outer", WAYS)
@pytest.mark.parametrize("inner", WAYS)
def test_gradients_are_those_without_checkpoints(inner: str, outer: str, storage: str) -> None:
    net = Net(WAYS[inner], WAYS[outer])
    plan = unit_scale(net, lambda m: m(X), storage=storage)
    found = gradients(net)
    net.zero_grad()
    net.inner = net.outer = WAYS["plain"]
    for name, gradient in gradients(net).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    if inner != "plain" and outer == "plain":
        assert plan.parameters["layer.weight"].reason == ""
