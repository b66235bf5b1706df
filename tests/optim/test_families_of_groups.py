"""One optimizer whose groups are of two families takes the steps that two optimizers, one of each, would take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.muon_and_adam import NS, MuonAndAdam
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_unitscale import UnitScalingError, scale_learning_rates, unit_scale
from lightning_unitscale.optim.families import family_of_group, optimizer_family

BATCH = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(32) % 4


def prepared() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    return module, unit_scale(module, loss_of, storage="unit")


def loss_of(module: nn.Module) -> Tensor:
    return F.cross_entropy(module(BATCH.double()), CLASSES)


def train(module: nn.Module, *optimizers: torch.optim.Optimizer) -> list[Tensor]:
    for _ in range(4):
        module.zero_grad()
        loss_of(module).backward()
        for optimizer in optimizers:
            optimizer.step()
    return [parameter.detach() for parameter in module.parameters()]


def halves(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    hidden = [parameter for name, parameter in module.named_parameters() if name == "2.weight"]
    return hidden, [parameter for name, parameter in module.named_parameters() if name != "2.weight"]


@pytest.mark.parametrize(
    "says",
    [
        ({"use_muon": True}, {"use_muon": False}),
        ({"use_muon": True, "optimizer_family": "muon"}, {"optimizer_family": "adam", "decoupled_weight_decay": True}),
    ],
)
def test_groups_of_two_families_step_as_two_optimizers_do(says: tuple[dict[str, Any], dict[str, Any]]) -> None:
    module, plan = prepared()
    one = MuonAndAdam([{"params": part, **said} for part, said in zip(halves(module), says, strict=True)])
    scale_learning_rates(one, plan)
    together = train(module, one)

    module, plan = prepared()
    hidden, others = halves(module)
    two = (
        torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.1, momentum=0.95, **NS),  # type: ignore[arg-type]
        torch.optim.AdamW(others, lr=1e-2, weight_decay=0.1),
    )
    for optimizer in two:
        scale_learning_rates(optimizer, plan)
    for value, expected in zip(together, train(module, *two), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


def test_groups_that_say_nothing_are_refused_and_told_what_to_say() -> None:
    module, plan = prepared()
    with pytest.raises(UnitScalingError, match=r'MuonAndAdam needs.*"optimizer_family" in each parameter group'):
        scale_learning_rates(MuonAndAdam([{"params": part} for part in halves(module)]), plan)


def test_a_family_that_there_is_not_is_refused() -> None:
    with pytest.raises(UnitScalingError, match="optimizer_family='shampoo' is not known"):
        family_of_group({"optimizer_family": "shampoo"})


def test_dion_names_its_algorithm() -> None:
    assert [family_of_group({"algorithm": name}) for name in ("muon", "adamw", "dion")] == ["muon", "adam", None]


def test_the_family_of_the_optimizer_is_that_of_its_first_group() -> None:
    assert optimizer_family(MuonAndAdam([{"params": [nn.Parameter(torch.ones(2, 2))], "use_muon": True}])) == "muon"
