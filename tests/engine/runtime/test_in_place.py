"""Factors on activations that are computed in place: gradients as autograd has them, the caller's tensor scaled."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale import unit_scale

IN_PLACE: dict[str, Callable[[Tensor], object]] = {
    "relu_": lambda h: h.relu_(),
    "elu_": lambda h: F.elu_(h),
    "leaky_relu_": lambda h: F.leaky_relu_(h),
    "tanh_": lambda h: h.tanh_(),
    "relu(inplace=True)": lambda h: F.relu(h, inplace=True),
    "hardtanh(inplace=True)": lambda h: F.hardtanh(h, -1.0, 1.0, True),
    "silu(inplace=True)": lambda h: F.silu(h, inplace=True),
}


class Cells(nn.Module):
    """A cell called in a loop; the activation, in place, of each of its outputs."""

    def __init__(self, activation: Callable[[Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.activation, self.cell, self.head = activation, nn.GRUCell(4, 6), nn.Linear(6, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for step in x.unbind(1):
            h = self.cell(step)
            self.activation(h)  # the caller goes on with h
            outputs.append(self.head(h))
        return torch.stack(outputs, 1)


@pytest.mark.parametrize("name", IN_PLACE)
def test_gradients_of_an_activation_in_place_are_finite_differences(name: str) -> None:
    x, losses = torch.randn(3, 5, 4, dtype=torch.float64), []
    for storage in ("folded", "unit"):
        model = Cells(IN_PLACE[name])
        unit_scale(model, lambda m: m(x).square().mean(), storage=storage)
        weight = model.cell.weight_ih
        loss = model(x).square().mean()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            direction, step = torch.randn_like(weight), 1e-6
            weight.add_(direction, alpha=step)
            above = model(x).square().mean()
            weight.add_(direction, alpha=-2 * step)
            below = model(x).square().mean()
        expected = float((above - below) / (2 * step))
        assert float((weight.grad * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
