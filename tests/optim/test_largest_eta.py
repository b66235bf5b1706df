"""Rates beyond the largest useful η: how far they are taken down, and that the rest of training does not notice."""

from collections.abc import Callable
from math import log2, sqrt
from typing import Any

import pytest
import torch
from support import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from lightning_unitscale import Plan, UnitScalingError, scale_learning_rates, unit_scale

WIDTH, CLASSES, STD = 64, 10, 0.02
GENERATOR = torch.Generator().manual_seed(1)
X, Y = torch.randn(32, WIDTH, generator=GENERATOR), torch.randint(CLASSES, (32,), generator=GENERATOR)
HIDDEN, READOUT = "0.weight", "2.weight"


def classifier() -> nn.Sequential:
    """Drawn with std 0.02, as the models of transformers are; without biases, whose rates no plan changes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU(), nn.Linear(WIDTH, CLASSES, bias=False))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=STD)
    return model


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X.to(next(model.parameters()).dtype)), Y)


def multipliers(rate: float, make: Callable[..., Optimizer] = AdamW, **options: Any) -> dict[str, float]:
    """Under a plan for an optimizer of that learning rate."""
    model = classifier()
    plan = unit_scale(model, loss_of, **options)
    scale_learning_rates(make(model.parameters(), rate), plan)
    return plan.lr_multipliers


def eta(rate: float, plan: Plan) -> float:
    """What a step changes a hidden layer's output by, of an input of RMS 1 that it is aligned with."""
    weight = plan.parameters[HIDDEN]
    return rate * plan.lr_multipliers[HIDDEN] / weight.stored * sqrt(WIDTH)


def test_a_rate_is_taken_for_the_largest_useful_one() -> None:
    model = classifier()
    plan = unit_scale(model, loss_of)
    before = dict(plan.lr_multipliers)
    rate = 8 * 0.5 / eta(1.0, plan)
    scale_learning_rates(AdamW(model.parameters(), rate), plan)
    assert eta(rate, plan) == pytest.approx(0.5, rel=0.03)  # to a sixteenth of an octave
    factors = [plan.lr_multipliers[name] / before[name] for name in (HIDDEN, READOUT)]
    assert factors == pytest.approx([1 / 8, 1 / 8], rel=0.03)
    assert 16 * log2(factors[0]) == pytest.approx(round(16 * log2(factors[0])))
    assert "limited to 0.5" in plan.explain(HIDDEN)


def test_usual_rates_are_left_alone() -> None:
    assert multipliers(1e-4) == multipliers(1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_higher_rates_all_train_alike(storage: str, decay: float) -> None:
    losses = []
    with zoo.default_dtype(torch.float64):
        for rate in (0.05, 0.4):
            model = classifier()
            plan = unit_scale(model, loss_of, storage=storage)
            optimizer = AdamW(model.parameters(), rate, weight_decay=decay)
            scale_learning_rates(optimizer, plan)
            losses.append([])
            for _ in range(5):
                optimizer.zero_grad()
                loss = loss_of(model)
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def one_cycle(optimizer: Optimizer) -> Any:
    return OneCycleLR(optimizer, max_lr=0.4, total_steps=100)


def warm_up(optimizer: Optimizer) -> Any:
    return LambdaLR(optimizer, lambda step: (step + 1) / 100)


@pytest.mark.parametrize(("rate", "schedule"), [(1e-4, one_cycle), (0.4, warm_up)])
def test_a_schedule_is_judged_by_its_peak(rate: float, schedule: Callable[[Optimizer], Any]) -> None:
    model = classifier()
    plan = unit_scale(model, loss_of)
    optimizer = AdamW(model.parameters(), rate)
    schedule(optimizer)
    scale_learning_rates(optimizer, plan)
    assert plan.lr_multipliers == multipliers(0.4)


def test_an_optimizer_that_has_taken_steps_goes_on_with_what_the_plan_says() -> None:
    model = classifier()
    plan = unit_scale(model, loss_of)
    optimizer = AdamW(model.parameters(), 0.4)
    scale_learning_rates(optimizer, plan)
    limited = dict(plan.lr_multipliers)
    loss_of(model).backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e-4  # as a plateau may have had it before a checkpoint
    read = Plan.from_dict(plan.to_dict())
    read.bind(model)
    scale_learning_rates(optimizer, read)
    assert read.lr_multipliers == limited
    scale_learning_rates(AdamW(model.parameters(), 1e-4), plan)  # a new one begins anew
    assert plan.lr_multipliers == multipliers(1e-4)


def test_it_is_a_hyperparameter_of_the_whole_model() -> None:
    assert multipliers(0.4, hyperparameters={"eta_most": 1e6}) == multipliers(1e-5)
    with pytest.raises(UnitScalingError, match="eta_most"):
        unit_scale(classifier(), loss_of, overrides={"0": {"eta_most": 2.0}})


@pytest.mark.parametrize(
    "options", [{"lr_units": "umup"}, {"scheme": "preserve"}, {"overrides": {"*": {"lr_multiplier": 2.0}}}]
)
def test_rates_that_are_not_ours_stay(options: dict[str, Any]) -> None:
    assert multipliers(4.0, **options) == multipliers(0.1, **options)


def test_other_families_are_left_alone() -> None:
    assert multipliers(4.0, make=SGD) == multipliers(1e-5)
