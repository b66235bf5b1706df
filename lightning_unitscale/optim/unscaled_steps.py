"""A step on a prepared model's weights without its plan's multipliers is another step than the scheme's: say so.

A second `fit` without the callback, or a loop that never calls `scale_learning_rates`, would train on without a word,
hidden weights at a fraction or a multiple of their rate. None of our code runs there, so once a plan is in force a
pre-hook stands before the steps of all torch optimizers. After an optimizer's first step it is one look-up.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_unitscale.engine.plan.plan import Plan, prepared_models
from lightning_unitscale.engine.plan.step_scales import FAMILIES, PLAIN
from lightning_unitscale.engine.runtime.placement import check_placement
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.optim.families import family_of_group, optimizer_family
from lightning_unitscale.optim.scaled_step import parameters_with_scaled_steps
from lightning_unitscale.warn_user import warn_user

_SEEN: weakref.WeakKeyDictionary[Optimizer, tuple[int, int]] = weakref.WeakKeyDictionary()
_plans_put_in_force = 0


def watch_steps() -> None:
    """Look at every optimizer's next step: a plan has been put in force."""
    global _plans_put_in_force
    if not _plans_put_in_force:
        register_optimizer_step_pre_hook(_look)
    _plans_put_in_force += 1


def _look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    now = _plans_put_in_force, len(optimizer.param_groups)
    if _SEEN.get(optimizer) == now:
        return
    _SEEN[optimizer] = now
    stepped = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    stepped -= parameters_with_scaled_steps()
    for module, plan in prepared_models().items() if stepped else ():
        names = _unscaled(optimizer, module, plan, stepped)
        if names:
            check_placement(module)
            _warn(optimizer, module, names)


def _unscaled(optimizer: Optimizer, module: nn.Module, plan: Plan, stepped: set[Tensor]) -> list[str]:
    """The parameters among them that have a multiplier under this optimizer, or, if its family is unknown, any."""
    try:
        named = {family_of_group(group) for group in optimizer.param_groups}
        families = sorted({optimizer_family(optimizer), *(family for family in named if family)})
    except UnitScalingError:
        families = list(FAMILIES)
    scaled = {
        name
        for family in families
        for name, scale in plan.step_scales(family, decoupled_decay=True).items()
        if scale != PLAIN
    }
    scaled |= plan.divided_gradients
    return [name for name, parameter in module.named_parameters() if name in scaled and parameter in stepped]


def _warn(optimizer: Optimizer, module: nn.Module, names: list[str]) -> None:
    warn_user(
        f"unit scaling: this {type(optimizer).__name__} steps {len(names)} parameters of {type(module).__name__} "
        f"({', '.join(names[:3])}{' …' if len(names) > 3 else ''}) without the learning-rate multipliers of the plan "
        "that they were prepared with, so some learn much faster or slower than they did. In a Trainer, give it the "
        "UnitScaling callback or a unitscale strategy again, at every fit; in a loop of your own, call "
        "scale_learning_rates(optimizer, plan) before the first step. To go on without, call "
        "remove_unit_scaling(model) and make learning rates your own."
    )
