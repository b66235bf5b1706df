"""The families of optimizers: one class each, with its rule; see `engine.plan.step_scales` for what they share.

In the formulas F = multiplier · U is what the function sees, S = stored · U what is kept, r = multiplier/stored.
`lr(F)` is the scheme's learning rate of F, which under `lr_units="standard"` is relative_lr · |multiplier| times the
limits that the first batch (`schemes.step_limits`) and the optimizer's own rates (`largest_eta`) set, and under "umup"
follows from that of U.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from typing_extensions import override

from lightning_unitscale.engine.plan.parameter_plan import ParameterPlan
from lightning_unitscale.engine.plan.step_scales import FAMILIES, Family, gradient_ratio, register, seen_ratio
from lightning_unitscale.errors import UnitScalingError


@register
class Adam(Family):
    """The update does not change when gradient and eps are multiplied by one constant.

        lr(S)  = lr(F) / r = stored · lr(U)
        eps(S) = |r| · eps           or eps(U) / stored, where the scheme has a rule for eps;
                                     eps, where gradients are divided by their own scale

    Source: the abc-symmetry of Adam (u-μP, arXiv 2407.17465, section 2.1); `unit_lr` is table 2's rule.
    """

    name = "adam"
    condition = "its update does not depend on the gradient's scale"
    torch_classes = ("Adam", "AdamW", "NAdam", "Adamax", "Adagrad", "RMSprop", "SparseAdam")
    # Of lion-pytorch, apex, DeepSpeed, torchao and bitsandbytes.
    other_classes = (
        *("Lion", "FusedAdam", "DeepSpeedCPUAdam"),
        *("Adam8bit", "Adam4bit", "AdamFp8", "AdamW8bit", "AdamW4bit", "AdamWFp8", "PagedAdamW", "PagedAdamW8bit"),
    )
    decoupled_decay = ("*AdamW*", "Lion")

    @override
    def lr(self, parameter: ParameterPlan, lr_units: str) -> float:
        if lr_units == "standard":
            limits = parameter.step_limit * parameter.eta_limit
            return limits * parameter.relative_lr * abs(parameter.multiplier) / gradient_ratio(parameter)
        return parameter.unit_lr * parameter.stored

    @override
    def eps(self, parameter: ParameterPlan) -> float:
        if parameter.unit_eps is not None:
            return parameter.unit_eps / abs(parameter.stored or 1.0)
        return abs(seen_ratio(parameter))


@register
class SGD(Family):
    """The update is proportional to the gradient, with or without momentum.

        lr(S) = lr(F) / r² = stored² · lr(U)

    Under `lr_units="standard"` a readout keeps the user's own rate, as the scheme's would be smaller still.

    Where gradients are divided by their own scale, the update is in no proportion to them any more: lr(S) = stored ·
    lr(U), as under Adam. A rate then has no ordinary meaning that could be kept, and in either unit is that of U.

    Source: u-μP (arXiv 2407.17465), section 2.1; `sgd_lr` is μP's rule for SGD (arXiv 2203.03466, table 8).
    """

    name = "sgd"
    condition = "its update is proportional to the gradient"
    torch_classes = ("SGD",)

    @override
    def lr(self, parameter: ParameterPlan, lr_units: str) -> float:
        if parameter.divided_gradient:
            return parameter.sgd_lr * parameter.stored
        if lr_units == "standard":
            function_lr = 1.0 if parameter.role == "readout" else parameter.relative_lr * abs(parameter.multiplier)
            return parameter.sgd_step_limit * function_lr / gradient_ratio(parameter) ** 2
        return parameter.sgd_lr * parameter.stored**2


@register
class Muon(Family):
    """The update of a matrix is its gradient made orthogonal: of a fixed spectral norm, which suits any width.

        lr(S) = depth_lr / r                in either unit: of the scheme's rule the part that comes from depth is left

    Source: Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon), and the same symmetry as Adam's.
    """

    name = "muon"
    condition = "it orthogonalises the gradient"
    torch_classes = ("Muon",)
    decoupled_decay = ("*",)

    @override
    def lr(self, parameter: ParameterPlan, lr_units: str) -> float:
        return parameter.depth_lr / gradient_ratio(parameter)


GROUP_KEY = "optimizer_family"  # of a group: its own family, where one class has several
_GROUPS_SAY: dict[str, dict[Any, str]] = {  # what groups of classes with several families say: key, value, family
    "use_muon": {True: "muon", False: "adam"},  # MuonWithAuxAdam (Jordan et al.)
    "algorithm": {"muon": "muon", "adamw": "adam", "lion": "adam"},  # dion (Ahn et al.)
}


def family_of_group(group: Mapping[str, Any]) -> str | None:
    """The family that a parameter group names itself: as `optimizer_family`, or as optimizers of several families do.

    Raises:
        UnitScalingError: there is no such family.
    """
    check_family(group.get(GROUP_KEY), f"{GROUP_KEY} of a parameter group: {GROUP_KEY}")
    known = (families.get(group.get(key)) for key, families in _GROUPS_SAY.items())
    return group.get(GROUP_KEY) or next((family for family in known if family is not None), None)


def decay_is_decoupled(optimizer: Optimizer, group: Mapping[str, Any], family: str) -> bool:
    """Whether weight decay acts beside the gradient in this group; in all known optimizers of several families it does.

    Args:
        family: the group's, or the optimizer's.
    """
    named = family_of_group(group)
    if named is not None and GROUP_KEY not in group:
        return bool(group.get("decoupled_weight_decay", True))
    return FAMILIES[family].decay_is_decoupled(optimizer, group)


_ONE_STEP_SIZE = "it takes one step size for all parameters"  # so with any family, different multipliers are refused
# Optimizers that no family suits. Who names one for them takes the consequences.
_WHY_NOT = {
    "RAdam": "its first steps, before rectification, are plain momentum and follow the gradient's scale",
    "Adafactor": "its step is relative to the parameter's own RMS",
    "Adadelta": "its step is made from the size of former steps",
    "ASGD": "its decay `lambd` can't be matched to a parameter's scale",
    "Rprop": "its step sizes live in its state, where no learning rate reaches them",
    "LBFGS": _ONE_STEP_SIZE,
    "LAMB": "its step is relative to the parameter's own norm",
    "Lamb": "its step is relative to the parameter's own norm",
    "LARS": "its step is relative to the parameter's own norm",
}


def optimizer_family(optimizer: Optimizer, otherwise: str | None = None) -> str:
    """How the optimizer's update answers to the scale of a gradient: the name of its family, such as `"adam"`.

    A subclass is of its parent's family. Where each group names its own (`family_of_group`), it is the first one's.

    Args:
        otherwise: the family of an optimizer whose class is of none.

    Raises:
        UnitScalingError: the class is of no family; the message says how to name one.
    """
    reason = ""
    for cls in type(optimizer).__mro__:
        family = next((family for family in FAMILIES.values() if family.includes(cls)), None)
        if family is not None and not optimizer.defaults.get("initial_accumulator_value"):
            return family.name
        if family is not None:
            reason = "its initial_accumulator_value is not 0 and has the unit of a squared gradient"
        reason = reason or _WHY_NOT.get(cls.__name__, "")
        if reason:
            break
    named = [family_of_group(group) for group in optimizer.param_groups]
    if named and named[0] is not None and None not in named:
        return named[0]
    if otherwise is not None:
        return otherwise
    raise UnitScalingError(
        f"Unit scaling doesn't know which learning-rate multipliers the optimizer {type(optimizer).__name__} needs"
        f"{': ' if reason else ''}{reason}. {_way_out(type(optimizer).__name__, reason != _ONE_STEP_SIZE)}"
    )


def _way_out(optimizer: str, can_be_named: bool) -> str:
    known = ", ".join(name for family in FAMILIES.values() for name in family.torch_classes)
    if not can_be_named:
        return f'Use one of {known}, or scheme="preserve", which needs no multipliers.'
    conditions = ", ".join(f'family="{family.name}" if {family.condition}' for family in FAMILIES.values())
    return (
        f"Use one of {known}, or say which family {optimizer} belongs to, as scale_learning_rates(optimizer, plan, "
        "family=…) or, with a Trainer, as UnitScaling(optimizer_family=…) or the same argument of the strategy: "
        f'{conditions}. One that treats its groups in several ways needs "{GROUP_KEY}" in each parameter group.'
    )


def check_family(name: str | None, argument: str) -> None:
    """
    Raises:
        UnitScalingError: the value that the argument of that name was given is no family.
    """
    if name is not None and name not in FAMILIES:
        raise UnitScalingError(f"{argument}={name!r} is not known; choose one of {', '.join(map(repr, FAMILIES))}.")
