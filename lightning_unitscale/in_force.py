"""A plan put in force on a model, and taken off again: with the function kept, or with the weights as they were."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_unitscale.engine.plan.fold import folded_copy
from lightning_unitscale.engine.plan.plan import ATTRIBUTE, Plan, plan_of
from lightning_unitscale.engine.plan.rename import plan_around
from lightning_unitscale.engine.plan.site import READING
from lightning_unitscale.engine.plan.state_dict import add_marker, remove_marker
from lightning_unitscale.engine.runtime.install import install, restore_parameters, uninstall, untouched_factors
from lightning_unitscale.engine.runtime.kept_copies import Kept
from lightning_unitscale.engine.runtime.placement import check_placement
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.optim.unscaled_steps import watch_steps
from lightning_unitscale.warn_user import warn_user


def put_in_force(module: nn.Module, plan: Plan) -> None:
    """Install the plan on a model whose weights already are what it stores.

    Raises:
        UnitScalingError: the plan is of another model.
    """
    plan.check_matches(module)
    install(module, plan)
    module.__dict__[ATTRIBUTE] = plan
    add_marker(module, plan)
    plan.bind(module)
    watch_steps()


def adopt(module: nn.Module) -> Plan | None:
    """The plan in force on the module; one on the part that has all its parameters is made a plan of the whole.

    A network with a plan, given its weights on its own, may be trained inside a LightningModule.
    """
    plan = plan_of(module)
    if plan is not None:
        return plan
    for name, child in module.named_modules():
        inner = plan_of(child)
        if inner is None:
            continue
        plan = plan_around(inner, name)
        try:
            plan.check_matches(module)
        except UnitScalingError:
            continue
        forget(child)
        put_in_force(module, plan)
        return plan
    return None


def remove(module: nn.Module) -> None:
    """Make a prepared model plain; see `remove_unit_scaling`."""
    plan = plan_of(module)
    if plan is None:
        raise UnitScalingError(f"{type(module).__name__} is not unit-scaled; there is nothing to remove.")
    check_placement(module)
    folded = folded_copy(plan)
    left = [site for site in folded.explicit_sites if site.role != READING]
    if left:
        sites = ", ".join(
            f"{site.name} ({site.role}; {site.reason or 'two factors for one weight'})" for site in left[:3]
        )
        raise UnitScalingError(
            f"{len(left)} factors cannot be moved into weights: {sites}{' …' if len(left) > 3 else ''}. "
            "The model was left as it was; keep unit scaling in place, or have a plain copy made that can move them: "
            "lightning_unitscale.export.to_plain(model, forward), unitscale export for a checkpoint of the recipes."
        )
    restore_parameters(module, plan, folded)
    forget(module)
    if read := [site for site in folded.explicit_sites if site.role == READING]:
        warn_user(
            f"unit scaling was removed: {read[0].reason}, and now reads it as it is stored. Penalties on weights have "
            "another size from here on."
        )


def forget(module: nn.Module) -> None:
    """Take the plan off, weights as they are."""
    uninstall(module)
    remove_marker(module)
    module.__dict__.pop(ATTRIBUTE, None)


def about_to_be_zero(module: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Copies of what no factor brings back: biases, which a scheme lets begin at 0."""
    named = dict(module.named_parameters())
    return {p.name: named[p.name].detach().clone() for p in plan.parameters.values() if p.from_initial == 0.0}


def bring_back(module: nn.Module, plan: Plan, zeroed: dict[str, Tensor], kept: list[Kept]) -> None:
    """Take a plan off again that was refused; weights and their kept copies are what they were, to rounding."""
    forget(module)
    factors = untouched_factors(plan)
    rescaled = [*module.named_parameters(), *((name, tensor) for _, tensor, name in kept)]
    with torch.no_grad():
        for name, tensor in rescaled:
            if name in zeroed:
                tensor.copy_(zeroed[name])
            elif name in factors:
                tensor.mul_(factors[name])
