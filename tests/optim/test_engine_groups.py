"""What an engine that flattens each parameter group is given trains as the user's optimizer with multipliers does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from lightning_unitscale import UnitScalingError, scale_learning_rates, unit_scale
from lightning_unitscale.optim.engine_groups import optimizer_for_engine

BATCH = torch.randn(32, 8, generator=torch.Generator().manual_seed(1)).double()
CLASSES = torch.arange(32) % 4


class FlatEngine:
    """As ZeRO without partners: one flat tensor a group, and one group at a time is stepped."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.members = [group["params"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            flat = torch.cat([parameter.detach().flatten() for parameter in group["params"]])
            group["params"] = [nn.Parameter(flat)]

    def step(self) -> None:
        groups = self.optimizer.param_groups
        for group, members in zip(groups, self.members, strict=True):
            (flat,) = group["params"]
            flat.grad = torch.cat([parameter.grad.flatten() for parameter in members])
            self.optimizer.param_groups = [group]
            self.optimizer.step()
            for parameter, piece in zip(members, flat.detach().split([p.numel() for p in members]), strict=True):
                parameter.data.copy_(piece.view_as(parameter))
        self.optimizer.param_groups = groups


def prepared(**options: Any) -> tuple[nn.Module, Any, torch.optim.Optimizer, LambdaLR]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    plan = unit_scale(module, loss_of, **options)
    groups = [{"params": [m.weight for m in module if isinstance(m, nn.Linear)], "weight_decay": 0.1}]
    groups.append({"params": [m.bias for m in module if isinstance(m, nn.Linear)], "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    return module, plan, optimizer, LambdaLR(optimizer, lambda step: 0.8**step)


def loss_of(module: nn.Module) -> Tensor:
    return F.cross_entropy(module(BATCH), CLASSES)


def train(module: nn.Module, steps: int, schedule: LambdaLR, step: Any) -> None:
    for _ in range(steps):
        module.zero_grad()
        loss_of(module).backward()
        step()
        schedule.step()


def assert_same(module: nn.Module, other: nn.Module) -> None:
    for value, expected in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)


def expected() -> nn.Module:
    module, plan, optimizer, schedule = prepared()
    scale_learning_rates(optimizer, plan)
    train(module, 6, schedule, optimizer.step)
    return module


def test_flat_groups_train_as_parameters_do() -> None:
    module, plan, optimizer, schedule = prepared()
    engine = FlatEngine(optimizer_for_engine(optimizer, plan, module, "adam"))
    assert len(engine.optimizer.param_groups) > len(optimizer.param_groups)
    train(module, 6, schedule, engine.step)
    assert_same(module, expected())


def test_a_state_that_is_loaded_goes_to_the_users_groups_too() -> None:
    module, plan, optimizer, schedule = prepared()
    engine = FlatEngine(optimizer_for_engine(optimizer, plan, module, "adam"))
    train(module, 3, schedule, engine.step)
    saved, weights, epoch = engine.optimizer.state_dict(), module.state_dict(), schedule.state_dict()

    other, plan, optimizer, schedule = prepared()
    other.load_state_dict(weights)
    engine = FlatEngine(optimizer_for_engine(optimizer, plan, other, "adam"))
    engine.optimizer.load_state_dict(saved)
    schedule.load_state_dict(epoch)
    before = [group["lr"] for group in optimizer.param_groups]
    torch.testing.assert_close(before, [1e-2 * 0.8**3] * 2)
    train(other, 3, schedule, engine.step)
    assert_same(other, expected())


class Averaging(torch.optim.SGD):
    """Remembers in its groups, as schedule-free optimizers do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.defaults["weight_lr_power"] = 2.0


@pytest.mark.parametrize(
    ("cls", "family", "reason"),
    [
        (torch.optim.RAdam, "adam_sized", "gradients of what the function sees"),
        (torch.optim.Adafactor, "relative", "relative to each parameter"),
        (Averaging, "sgd", "counts steps and sums weights"),
    ],
)
def test_what_flat_groups_can_not_do_is_refused(cls: Any, family: str, reason: str) -> None:
    module, plan, _, _ = prepared(storage="unit")
    with pytest.raises(UnitScalingError, match=reason):
        optimizer_for_engine(cls(module.parameters(), lr=0.01), plan, module, family)


def test_elementwise_families_can_be_flat_where_the_function_is_stored() -> None:
    module, plan, _, _ = prepared(storage="folded")
    assert optimizer_for_engine(torch.optim.RAdam(module.parameters()), plan, module, "adam_sized").param_groups
