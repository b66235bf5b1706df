"""A checkpointed function that is no method is run again outside every frame: no factor, and exact gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_unitscale import prepare, unit_scale
from lightning_unitscale.engine.checks.gradients_taken import take_gradients
from lightning_unitscale.engine.record import recorder
from lightning_unitscale.engine.record.autograd_functions import RUN_ASIDE
from lightning_unitscale.errors import WrongGradientsError

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


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_the_gate_of_the_gradients_runs_reentrant_checkpoints_as_training_does(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as if closures were methods: their factors are lost where a checkpoint runs them again, and there alone
    monkeypatch.setattr(recorder, "RUN_ASIDE", RUN_ASIDE - {inspect.unwrap(checkpoint).__code__})
    monkeypatch.setattr(prepare, "is_far_above", lambda before, after: False)
    net = Net(WAYS["reentrant"], WAYS["reentrant"])
    with pytest.raises(WrongGradientsError, match="not the slope of the loss"):
        unit_scale(net, lambda m: m(X), storage=storage)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_behind_reentrant_checkpoints_are_those_of_a_backward_pass(frozen: bool) -> None:
    # with a frozen first layer nothing but an input that requires gradients leads to the checkpoints
    net = Net(WAYS["reentrant"], WAYS["plain"])
    net.first.requires_grad_(not frozen)
    x = X.clone().requires_grad_()
    net(x).backward()
    expected = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    taken = take_gradients(net, lambda run: net(x), whole=True)
    assert taken.problem == ""
    assert taken.whole.keys() == expected.keys() >= {"weight", "layer.weight"}
    for name, gradient in expected.items():
        torch.testing.assert_close(taken.whole[name], gradient, msg=name)
    assert all(p.grad is None for p in net.parameters())
