"""An optimizer family is one class: a toy one, added here and nowhere else, steps as reckoned by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_unitscale import UnitScaling, UnitScalingError, scale_learning_rates, unit_scale
from lightning_unitscale.engine.plan.parameter_plan import ParameterPlan
from lightning_unitscale.engine.plan.step_scales import FAMILIES, Family, gradient_ratio, register
from lightning_unitscale.optim.families import optimizer_family

LR, DECAY, WIDTH, STEPS = 0.02, 0.3, 32, 5


class RootDescent(torch.optim.Optimizer):
    """Steps along the square root of each element of the gradient, to which weight decay is added."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                gradient = p.grad + group["weight_decay"] * p
                p.sub_(gradient.sign() * gradient.abs().sqrt(), alpha=group["lr"])


@pytest.fixture
def root() -> Iterator[None]:
    known = dict(FAMILIES)

    @register
    class Root(Family):
        """The update grows with the root of the gradient: lr(S) = lr(F) / r^1.5, for it grows by r^½ itself."""

        name = "root"
        condition = "its update grows with the gradient's root"
        other_classes: ClassVar = ("RootDescent",)

        def lr(self, parameter: ParameterPlan, lr_units: str) -> float:
            return parameter.relative_lr * abs(parameter.multiplier) / gradient_ratio(parameter) ** 1.5

    yield
    FAMILIES.clear()
    FAMILIES.update(known)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))
    return model.double()


def loss_of(model: Callable[[Tensor], Tensor], step: int = 0) -> Tensor:
    x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (model(x) - 1).square().mean()


def function_of(model: nn.Module, plan: Any) -> dict[str, Tensor]:
    """The tensors that the function sees, whatever part of their multipliers is stored."""
    ratios = {name: parameter.multiplier / parameter.stored for name, parameter in plan.parameters.items()}
    return {name: p.detach() * ratios[name] for name, p in model.named_parameters()}


def by_hand(initial: dict[str, Tensor], forward: nn.Module, lrs: dict[str, float]) -> dict[str, Tensor]:
    """The oracle: every function tensor takes root steps of its own length, and nothing is scaled anywhere."""
    tensors = {name: value.clone().requires_grad_() for name, value in initial.items()}
    for step in range(STEPS):
        loss = loss_of(partial(torch.func.functional_call, forward, tensors), step)
        gradients = torch.autograd.grad(loss, list(tensors.values()))
        for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
            decayed = gradient + DECAY * tensor.detach()
            tensor.data -= LR * lrs[name] * decayed.sign() * decayed.abs().sqrt()
    return {name: tensor.detach() for name, tensor in tensors.items()}


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_its_steps_are_those_of_the_function(storage: str) -> None:
    model = network()
    plan = unit_scale(model, loss_of, storage=storage, activations=False, verify=False)
    initial = function_of(model, plan)
    lrs = {name: p.relative_lr * abs(p.multiplier) for name, p in plan.parameters.items()}
    assert len({round(lr, 6) for lr in lrs.values()}) > 1
    assert storage == "folded" or any(p.multiplier != p.stored for p in plan.parameters.values())

    optimizer = RootDescent(model.parameters(), lr=LR, weight_decay=DECAY)
    assert scale_learning_rates(optimizer, plan).family == "root"
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()

    expected = by_hand(initial, network(), lrs)
    for name, value in function_of(model, plan).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
        assert not torch.equal(value, initial[name])


@pytest.mark.usefixtures("root")
def test_options_and_messages_know_it() -> None:
    assert UnitScaling(optimizer_family="root").unit_scaling.settings[1] == "root"
    with pytest.raises(UnitScalingError, match='family="root" if its update grows with the gradient\'s root'):
        optimizer_family(torch.optim.Rprop(network().parameters()))


def test_it_is_gone_again() -> None:
    with pytest.raises(UnitScalingError, match="'root' is not known"):
        UnitScaling(optimizer_family="root")
