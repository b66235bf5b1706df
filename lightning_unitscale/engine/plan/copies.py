"""Copies of a part of the model that the model holds itself take the rules of that part.

A momentum encoder, a target network, an average of the weights or a frozen reference model starts as a copy: equal
values, under other names, and the recorded step learns nothing for it: it is frozen, not called, or called without
gradients. Training code moves numbers from one to the other
(`target.lerp_(online, 0.01)`, `load_state_dict`), so both must store the same thing and have the same factors.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from lightning_unitscale.engine.plan.parameter_plan import FROZEN
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.plan.rename import follow_renamed, renamed_site
from lightning_unitscale.engine.plan.siblings import like
from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.record.places import Frame


def include_copies(plan: Plan, module: nn.Module, learned: Collection[str]) -> None:
    """Give the parameters of every such copy the constants of the original, and its calls the original's sites.

    Args:
        learned: names of the parameters that gradients of the recorded loss reach.
    """
    done: list[str] = []
    for name, child in module.named_modules():
        if not name or any(_inside(name, other) for other in done):
            continue
        is_left_alone = _is_left_alone(plan, name, child)
        if not is_left_alone and not _is_called_only_beside(plan, name, child, learned):
            continue
        for original, other in module.named_modules():
            if not original or _inside(original, name) or _is_left_alone(plan, original, other):
                continue
            if not is_left_alone and not any(_inside(key, original) for key in learned):
                continue  # both are called beside the loss alone, and have rules already
            if _are_equal(child, other):
                if _is_tied_to_its_surroundings(plan, original):
                    plan.notes.append(
                        f"{name} is a copy of {original}, but keeps its own scale: factors cross its edge"
                    )
                else:
                    _replace(plan, original, name)
                    plan.notes.append(f"{name} is a copy of {original} and takes its rules")
                done.append(name)
                break


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _is_left_alone(plan: Plan, name: str, child: nn.Module) -> bool:
    parameters = [plan.parameters.get(f"{name}.{key}") for key, _ in child.named_parameters()]
    return bool(parameters) and all(
        parameter is not None and (parameter.reason == FROZEN or parameter.role == "unused") for parameter in parameters
    )


def _is_called_only_beside(plan: Plan, name: str, child: nn.Module, learned: Collection[str]) -> bool:
    names = [f"{name}.{key}" for key, _ in child.named_parameters()]
    return bool(names) and all(key in plan.parameters and key not in learned for key in names)


def _are_equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are of one class and have the same numbers, drawn at random somewhere."""
    if type(one) is not type(other):
        return False
    left, right = dict(one.named_parameters()), dict(other.named_parameters())
    if left.keys() != right.keys() or any(left[key] is right[key] for key in left):
        return False
    equal = all(left[key].shape == right[key].shape and torch.equal(left[key], right[key]) for key in left)
    return equal and any(len(parameter.unique()) > 1 for parameter in left.values())


def _is_tied_to_its_surroundings(plan: Plan, original: str) -> bool:
    """Whether a factor folds from outside the module into it, or from inside it out."""
    for site in plan.sites:
        inside = {_inside(key, original) for key, _ in site.fold_into}
        if inside - {_inside(site.module, original)}:
            return True
    return False


def _replace(plan: Plan, original: str, copy: str) -> None:
    def renamed(name: str) -> str:
        return copy + name.removeprefix(original) if _inside(name, original) else name

    for name in list(plan.parameters):
        if _inside(name, original):
            plan.parameters[renamed(name)] = like(plan.parameters[renamed(name)], plan.parameters[name])
    plan.sites = [site for site in plan.sites if not _is_of(site, copy)]
    for site in [site for site in plan.sites if _is_of(site, original)]:
        twin = renamed_site(site, renamed)
        twin.calls = 0
        plan.sites.append(twin)
    for where, method, keys in list(plan.frames):
        copied = [key.renamed(renamed) for key in keys if key.renamed(renamed) != key]
        if copied or renamed(where) != where:
            known = plan.frame_plan(Frame(renamed(where), method)).keys
            known.extend(key for key in copied if key not in known)
    follow_renamed(plan, renamed)


def _is_of(site: Site, module: str) -> bool:
    return _inside(site.module, module) or any(_inside(name, module) for key in site.params for name in key.names)
