"""The oracle of scaled steps: groups that were really split, by hand, and the small model they are of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules

from lightning_unitscale.engine.plan.step_scales import StepScale

STEPS = 6


class Plan:
    """Stands for `engine.plan.plan.Plan`: constants by parameter name."""

    largest_eta: float | None = None
    unfollowed_schedule: tuple[int, ...] = ()
    parameters: ClassVar[dict[str, object]] = {}
    divided_gradients: frozenset[str] = frozenset()

    def __init__(self, module: nn.Module, scales: dict[str, StepScale], coupled: dict[str, StepScale] | None = None):
        self.model, self.scales, self.coupled = module, scales, coupled or scales
        self.asked: list[tuple[str, bool]] = []

    def step_scales(self, family: str, *, decoupled_decay: bool) -> dict[str, StepScale]:
        self.asked.append((family, decoupled_decay))
        return self.scales if decoupled_decay else self.coupled

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def differences(self, module: nn.Module) -> dict[str, list[str]]:
        return {"missing": [], "other shape": [], "replaced": []}


SCALES = {
    "0.weight": StepScale(lr=0.25, weight_decay=4.0, eps=0.5),
    "0.bias": StepScale(),
    "2.weight": StepScale(lr=3.0, weight_decay=1 / 3, eps=7.0),
    "2.bias": StepScale(lr=0.25, weight_decay=4.0, eps=0.5),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def loss_of(module: nn.Module, step: int) -> Tensor:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
    return (module(x) - 1).square().mean()


def backward(module: nn.Module, step: int) -> Tensor:
    module.zero_grad()
    loss = loss_of(module, step)
    loss.backward()
    return loss


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


Groups = list[dict[str, Any]]


class ByHand:
    """The oracle: groups split for good, hyperparameters copied times their factors from unsplit groups every step."""

    def __init__(self, module: nn.Module, make: Callable[[Any], torch.optim.Optimizer], scales: dict[str, StepScale]):
        self.module = module
        names = {parameter: name for name, parameter in module.named_parameters()}
        # Carries the user's hyperparameters, and a scheduler if there is one; it is never stepped itself.
        self.users = make(two_groups(module))
        self.origin: list[tuple[int, StepScale]] = []
        split: Groups = []
        for index, group in enumerate(self.users.param_groups):
            for scale in dict.fromkeys(scales.get(names[p], StepScale()) for p in group["params"]):
                split.append({"params": [p for p in group["params"] if scales.get(names[p], StepScale()) == scale]})
                self.origin.append((index, scale))
        self.optimizer = make(split)

    def step(self) -> None:
        for piece, (index, scale) in zip(self.optimizer.param_groups, self.origin, strict=True):
            for key, value in self.users.param_groups[index].items():
                if key != "params":
                    piece[key] = value * getattr(scale, key, 1.0) if key in vars(scale) else value
        self.optimizer.step()


def two_groups(module: nn.Module) -> Groups:
    parameters = list(module.parameters())
    return [{"params": parameters[:3]}, {"params": parameters[3:], "weight_decay": 0.3}]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, eps=1e-3),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, fused=True),
    "adamw-loop": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, foreach=False),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.02), weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.02, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.02, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02, weight_decay=0.1, momentum=0.9, centered=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.02, weight_decay=0.1, momentum=0.9, fused=True),
}


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: schedules.LambdaLR(o, [lambda step: 0.9**step] * len(o.param_groups)),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, T_max=STEPS, eta_min=1e-3),
    "one-cycle": lambda o: schedules.OneCycleLR(o, max_lr=0.05, total_steps=STEPS + 1),
    "cyclic": lambda o: schedules.CyclicLR(
        o, base_lr=0.01, max_lr=0.05, step_size_up=2, cycle_momentum="momentum" in o.defaults or "betas" in o.defaults
    ),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "sequential": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=2), schedules.CosineAnnealingLR(o, T_max=4)], milestones=[2]
    ),
}


def advance(scheduler: Any) -> None:
    scheduler.step(1.0) if isinstance(scheduler, schedules.ReduceLROnPlateau) else scheduler.step()
