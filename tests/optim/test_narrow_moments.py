"""torchao's optimizers, whose moments are in FP8 or in blocks of 8 bits, under our multipliers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_unitscale import Plan, scale_learning_rates, unit_scale

optim = pytest.importorskip("torchao.optim")
NAMES = ("AdamWFp8", "AdamFp8", "AdamW8bit", "Adam8bit")


@pytest.fixture(autouse=True)
def _uncompiled() -> Any:
    """They compile their step, which takes minutes on a CPU."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def prepared() -> tuple[nn.Module, Plan, Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)), torch.randn(64, 64)
    return model, unit_scale(model, lambda m: (m(x) - x).square().mean(), storage="unit"), x


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> list[float]:
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:unit scaling. this Adam.* without the learning-rate multipliers")  # by hand
def test_steps_are_those_of_groups_split_by_hand(name: str) -> None:
    model, plan, x = prepared()
    by_hand = copy.deepcopy(model)
    new = getattr(optim, name)
    optimizer = new(model.parameters(), lr=1e-2, weight_decay=0.1)
    scale_learning_rates(optimizer, plan)
    losses = train(model, optimizer, x)
    scales = plan.step_scales("adam", decoupled_decay=name.startswith("AdamW"))
    groups = [
        {
            "params": [p],
            "lr": 1e-2 * scales[key].lr,
            "weight_decay": 0.1 * scales[key].weight_decay,
            "eps": 1e-8 * scales[key].eps,
        }
        for key, p in by_hand.named_parameters()
    ]
    # a last bit of a rate, by the order of its factors, can move a moment by a step of 8 bits
    assert losses == pytest.approx(train(by_hand, new(groups, lr=1e-2), x), rel=1e-4)
    assert losses[-1] < losses[0]
    moments = optimizer.state[model[0].weight]["exp_avg"]
    assert type(moments).__name__ in ("OptimStateFp8", "OptimState8bit")
    assert len(optimizer.param_groups) == 1
