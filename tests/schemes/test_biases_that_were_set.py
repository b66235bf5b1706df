"""Biases begin at zero, but for those whose values mean something."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale import unit_scale
from lightning_unitscale.engine.record.tensor_facts import is_set

PRIOR = torch.tensor([0.7, 0.2, 0.08, 0.02]).log()


class Net(nn.Module):
    """A recurrent layer, time steps made from its state, a warp, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.step = nn.LSTM(8, 32), nn.Linear(32, 32)
        self.warp, self.last = nn.Linear(32, 6), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.lstm(x)
        h = h * F.softplus(self.step(h))
        return F.cross_entropy(self.last(h) + self.warp(h).sum(-1, keepdim=True), torch.arange(len(x)) % 4)


def _forget_gate(net: Net) -> Tensor:
    with torch.no_grad():
        net.lstm.bias_ih_l0[32:64] = 1.0
    return net.lstm.bias_ih_l0


def _time_steps(net: Net) -> Tensor:
    steps = torch.rand(32).mul(4.6).sub(6.9).exp()
    net.step.bias.data = steps + torch.log(-torch.expm1(-steps))
    return net.step.bias


def _identity_warp(net: Net) -> Tensor:
    nn.init.zeros_(net.warp.weight)
    net.warp.bias.data = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    return net.warp.bias


def _prior(net: Net) -> Tensor:
    net.last.bias.data = PRIOR.clone()
    return net.last.bias


@pytest.mark.parametrize("meant", [_forget_gate, _time_steps, _identity_warp, _prior])
def test_a_bias_that_was_set_stays_and_the_others_begin_at_zero(meant: Callable[[Net], Tensor]) -> None:
    net = Net()
    bias = meant(net)
    expected = bias.detach().clone()
    unit_scale(net, lambda m: m(torch.randn(12, 8)), verify=False)
    torch.testing.assert_close(bias.detach(), expected)
    others = [p for name, p in net.named_parameters() if "bias" in name and p is not bias]
    assert all(not p.any() for p in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 10, 100, 5000])
def test_no_usual_draw_is_taken_for_one_that_was_set(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    draws = [torch.empty(size, dtype=dtype).uniform_(-0.1, 0.1), torch.randn(size).to(dtype)]
    draws += [nn.init.trunc_normal_(torch.empty(size), std=0.02).to(dtype), torch.cat([torch.zeros(size), draws[0]])]
    assert not any(map(is_set, draws))
