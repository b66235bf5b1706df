"""Operators that a library, or the user, has registered (`torch.library.custom_op`), with a backward of their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale import Plan, scale_learning_rates, unit_scale

WIDTH, CLASSES = 8, 5


@torch.library.custom_op("unitscale_tests::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """A readout and its loss in one, x [N, WIDTH], weight [CLASSES, WIDTH]."""
    return F.cross_entropy(x @ weight.T, target)


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, target = ctx.saved_tensors
    logits = (x @ weight.T).softmax(-1)
    logits[torch.arange(len(target)), target] -= 1
    logits *= gradient / len(target)
    return logits @ weight, logits.T @ x, None


linear_cross_entropy.register_autograd(
    _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


class Tied(nn.Module):
    """A table that the operator has for its readout too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = F.layer_norm(x + torch.relu(self.layer(x)), (WIDTH,))
        return linear_cross_entropy(x, self.table.weight, ids.roll(1))


IDS = torch.randint(0, CLASSES, (12,), generator=torch.Generator().manual_seed(1))


def prepared(storage: str) -> tuple[Tied, Plan]:
    model = Tied()
    return model, unit_scale(model, lambda m: m(IDS), storage=storage)


def test_a_table_that_an_operator_reads_is_one_function_in_both_storages() -> None:
    found = []
    for storage in ("folded", "unit"):
        model, plan = prepared(storage)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
        scale_learning_rates(optimizer, plan)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(IDS)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    assert found[:3] == pytest.approx(found[3:], rel=1e-9)


def test_its_gradients_are_finite_differences() -> None:
    model, _ = prepared("unit")
    model(IDS).backward()
    weight = model.table.weight
    assert weight.grad is not None
    direction, values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)).double(), []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(direction, alpha=sign * 1e-6)
            values.append(model(IDS).item())
            weight.add_(direction, alpha=-sign * 1e-6)
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(float((weight.grad * direction).sum()), rel=1e-6)
