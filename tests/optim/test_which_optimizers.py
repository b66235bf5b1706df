"""Which optimizers have multipliers, by which family, and which are refused with what message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from support.split_by_hand import (
    OPTIMIZERS,
    SCALES,
    SCHEDULES,
    STEPS,
    ByHand,
    Plan,
    assert_same,
    backward,
    network,
)
from torch.distributed.optim import ZeroRedundancyOptimizer

from lightning_unitscale.engine.plan.step_scales import StepScale
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.optim.families import optimizer_family
from lightning_unitscale.optim.scale_learning_rates import scale_learning_rates
from lightning_unitscale.optim.scaled_step import ScaledStep


class TwiceEvaluating(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
        return super().step(closure)


def test_second_evaluation_of_the_closure() -> None:
    module, expected = network(), network()
    optimizer = TwiceEvaluating(module.parameters(), lr=0.1)
    scale_learning_rates(optimizer, Plan(module, SCALES))
    with pytest.raises(UnitScalingError, match="TwiceEvaluating evaluates its closure more than once"):
        optimizer.step(lambda: backward(module, 0))

    scale_learning_rates(optimizer, Plan(module, dict.fromkeys(SCALES, StepScale(lr=2.0))))
    by_hand = TwiceEvaluating(expected.parameters(), lr=0.2)
    optimizer.step(lambda: backward(module, 0)), by_hand.step(lambda: backward(expected, 0))
    assert_same(module, expected)


@pytest.mark.parametrize("max_iter", [1, 5])
def test_lbfgs_needs_equal_multipliers(max_iter: int) -> None:
    module, expected = network(), network()
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=max_iter)
    with pytest.raises(UnitScalingError, match="LBFGS takes one step size"):
        scale_learning_rates(optimizer, Plan(module, SCALES), family="sgd")
    with pytest.raises(UnitScalingError, match="it takes one step size for all parameters") as refusal:
        scale_learning_rates(optimizer, Plan(module, SCALES))
    assert "family" not in str(refusal.value)  # for any is refused, as above
    assert "_unit_scaled_step" not in vars(optimizer)
    scale_learning_rates(optimizer, Plan(module, dict.fromkeys(SCALES, StepScale())))
    scale_learning_rates(optimizer, Plan(module, dict.fromkeys(SCALES, StepScale(lr=0.5))), family="sgd")
    by_hand = torch.optim.LBFGS(expected.parameters(), lr=0.05, max_iter=max_iter)
    for step in range(3):
        optimizer.step(lambda step=step: backward(module, step))
        by_hand.step(lambda step=step: backward(expected, step))
    assert_same(module, expected)


@pytest.mark.parametrize(
    ("cls", "family"),
    [
        (torch.optim.AdamW, "adam"),
        (torch.optim.SparseAdam, "adam"),
        (torch.optim.SGD, "sgd"),
        (torch.optim.RAdam, "adam_sized"),
        (torch.optim.Adafactor, "relative"),
        (type("Mine", (torch.optim.NAdam,), {}), "adam"),
        (type("Lion", (torch.optim.Optimizer,), {"__init__": lambda self, p: super(type(self), self).__init__(p, {})}),
         "adam"),
    ],
)  # fmt: skip
def test_families(cls: Any, family: str) -> None:
    assert optimizer_family(cls(network().parameters())) == family


@pytest.mark.parametrize("cls", ["Adadelta", "ASGD", "Rprop"])
def test_unknown_family_names_the_class_and_the_way_out(cls: str) -> None:
    module = network()
    optimizer = getattr(torch.optim, cls)(module.parameters())
    with pytest.raises(UnitScalingError, match=rf"optimizer {cls} needs: it.*family=\"adam\".*family=\"sgd\""):
        scale_learning_rates(optimizer, Plan(module, SCALES))
    assert "_unit_scaled_step" not in vars(optimizer)
    scale_learning_rates(optimizer, Plan(module, dict.fromkeys(SCALES, StepScale())))


def test_other_refusals() -> None:
    module = network()
    plan = Plan(module, SCALES)
    with pytest.raises(
        UnitScalingError, match="'adamw' is not known; choose one of 'adam', 'adam_sized', 'relative', 'sgd', 'muon'"
    ):
        scale_learning_rates(OPTIMIZERS["sgd"](module.parameters()), plan, family="adamw")
    with pytest.raises(UnitScalingError, match="None of the parameters of the SGD"):
        scale_learning_rates(OPTIMIZERS["sgd"](network().parameters()), plan)
    with pytest.raises(UnitScalingError, match="initial_accumulator_value"):
        optimizer_family(torch.optim.Adagrad(module.parameters(), initial_accumulator_value=0.1))
    with pytest.raises(UnitScalingError, match=r"eps=\(None, 0.001\) is to be multiplied by \(0.5, 1.0\)"):
        optimizer = torch.optim.Adafactor(module.parameters())
        scale_learning_rates(optimizer, plan, family="adam")
        optimizer.step()
    optimizer = OPTIMIZERS["sgd"](module.parameters())
    optimizer.step = lambda closure=None: None
    scale_learning_rates(optimizer, plan)
    with pytest.raises(UnitScalingError, match="step of this SGD was replaced"):
        optimizer.step()


def test_wrapped_optimizer_is_looked_through() -> None:
    module = network()
    optimizer = OPTIMIZERS["sgd"](module.parameters())
    scale_learning_rates(LightningOptimizer(optimizer), Plan(module, SCALES))
    assert isinstance(vars(optimizer)["_unit_scaled_step"], ScaledStep)


def test_zero_redundancy_optimizer(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module, expected = network(), network()
        options = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-3}
        optimizer = ZeroRedundancyOptimizer(module.parameters(), torch.optim.AdamW, **options)
        by_hand = ByHand(expected, OPTIMIZERS["adamw"], SCALES)
        by_hand.users.param_groups[1]["weight_decay"] = 0.1
        scale_learning_rates(optimizer, Plan(module, SCALES))
        scheduler, users_schedule = SCHEDULES["lambda"](optimizer), SCHEDULES["lambda"](by_hand.users)
        by_hand.users.step()
        for step in range(STEPS):
            backward(module, step), backward(expected, step)
            optimizer.step(), by_hand.step()
            scheduler.step(), users_schedule.step()
        assert_same(module, expected)
    finally:
        torch.distributed.destroy_process_group()
