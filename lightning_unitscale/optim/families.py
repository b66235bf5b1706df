"""The families of optimizers: one class each, with its rule; see `engine.plan.step_scales` for what they share.

In the formulas F = multiplier · U is what the function sees, S = stored · U what is kept, r = multiplier/stored.
`lr(F)` is the scheme's learning rate of F, which under `lr_units="standard"` is relative_lr · |multiplier| times the
limits that the first batch (`schemes.step_limits`) and the optimizer's own rates (`largest_eta`) set, and under "umup"
follows from that of U.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose
from typing import Any, ClassVar

from torch.optim import Optimizer
from typing_extensions import override

from lightning_unitscale.engine.plan.factors import ROUNDING
from lightning_unitscale.engine.plan.parameter_plan import ParameterPlan
from lightning_unitscale.engine.plan.step_scales import FAMILIES, Family, gradient_ratio, register
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
    torch_classes: ClassVar[tuple[str, ...]] = ("Adam", "AdamW", "NAdam", "Adamax", "Adagrad", "RMSprop", "SparseAdam")
    # Of schedulefree, lion-pytorch, apex, DeepSpeed, torchao and bitsandbytes.
    other_classes: ClassVar[tuple[str, ...]] = (
        *("AdamWScheduleFree", "Lion", "FusedAdam", "DeepSpeedCPUAdam"),
        *("Adam8bit", "Adam4bit", "AdamFp8", "AdamW8bit", "AdamW4bit", "AdamWFp8", "PagedAdamW", "PagedAdamW8bit"),
        *("Lion8bit", "PagedLion", "PagedLion8bit"),
    )
    decoupled_decay: ClassVar[tuple[str, ...]] = ("*AdamW*", "*Lion*")

    @override
    def lr(self, parameter: ParameterPlan, lr_units: str) -> float:
        if lr_units == "standard":
            limits = parameter.step_limit * parameter.eta_limit
            return limits * parameter.relative_lr * abs(parameter.multiplier) / gradient_ratio(parameter)
        return parameter.unit_lr * parameter.stored

    @override
    def eta(self, parameter: ParameterPlan) -> float | None:
        return parameter.step_limit * parameter.relative_lr / parameter.unit_lr

    @override
    def eps(self, parameter: ParameterPlan) -> float:
        if parameter.unit_eps is not None:
            return parameter.unit_eps / abs(parameter.stored or 1.0)
        return abs(self.seen_ratio(parameter))


@register
class AdamSized(Adam):
    """The update is of Adam's size, but answers to the gradient's scale in a way of its own: it is shown that of F.

        g      = gradient of F = gradient of S / r
        lr(S)  = lr(F) / r = stored · lr(U)
        eps(S) = eps                 or eps(U) / multiplier, where the scheme has a rule for eps

    RAdam: momentum for some steps, as SGD's, then Adam's update rectified (Liu et al., arXiv 1908.03265, algorithm 2).
    Adafactor, where steps are not relative to the parameter: its eps₁ is a squared gradient in the paper (Shazeer &
    Stern, arXiv 1804.04235, algorithm 4). SOAP: Adam in the eigenbasis of Shampoo's statistics, a rotation, which
    keeps an update's RMS (Vyas et al., arXiv 2409.11321, algorithm 3); it may normalise the update by an eps without a
    unit. The schedule-free RAdam: as RAdam (Defazio et al., arXiv 2405.15682).
    """

    name = "adam_sized"
    condition = "its update is of Adam's size, though it depends on the gradient's scale"
    torch_classes = ("RAdam",)
    other_classes = ("RAdamScheduleFree", "SOAP")  # of schedulefree, of pytorch_optimizer and its authors'
    decoupled_decay = ("RAdamScheduleFree", "SOAP")
    rates = "adam"
    sees_function = True

    @override
    def eps(self, parameter: ParameterPlan) -> float:
        if parameter.unit_eps is not None and not parameter.divided_gradient:
            return parameter.unit_eps / abs(parameter.multiplier or 1.0)
        return super().eps(parameter)


@register
class Relative(Family):
    """The update is relative to the parameter's own RMS, down to a floor, whatever the gradient's scale.

        ΔS = lr · max(eps₂, RMS(S)) · û,   RMS(û) ≤ 1          Adafactor (Shazeer & Stern, arXiv 1804.04235, section 8)

    RMS(S) = RMS(F) / |r|, so a step of S is one of F divided by |r| already, if eps₂ is:

        "standard"     lr(S) = relative_lr / initial_factor     the relative step that it had, 1 for hidden weights
                       eps₂(S) = relative_lr · |stored| · eps₂  the floor that it had, F being scaled
        "umup"         lr(S) = unit_lr                          U starts at RMS 1
                       eps₂(S) = |stored| · eps₂

    A weight that starts at zero is at the floor, which has all of relative_lr: its factor is 1. Torch's takes the lower
    of lr and t^-½ for lr: that cap is on the scaled rate, and the same for every parameter. The scheme's limits
    (`step_limits`, `largest_eta`) were found with steps that keep their size, and are not used. eps₁, be it squared or
    not, is that of F's gradient, which is shown.

    Decay beside the gradient is lr · decay · S in torch's; in transformers' it is relative too, so that it grows with
    RMS(S), and r · decay has its strength on F.
    """

    name = "relative"
    condition = "its update is relative to the parameter's own RMS"
    torch_classes = ("Adafactor",)
    other_classes = ("Adafactor",)  # of transformers
    rates = "adam"
    sees_function = True

    @override
    def lr(self, parameter: ParameterPlan, lr_units: str) -> float:
        if lr_units == "umup":
            return parameter.unit_lr
        redrawn = parameter.initial_rms and parameter.initial_factor  # 0 for biases, which begin at 0
        return parameter.relative_lr / parameter.initial_factor if redrawn else 1.0

    @override
    def floor(self, parameter: ParameterPlan, lr_units: str) -> float:
        own = parameter.relative_lr if lr_units == "standard" else 1.0
        return _one(own * abs(parameter.stored))

    @override
    def decay(self, parameter: ParameterPlan, lr: float, *, decoupled: bool) -> float:
        kept = super().decay(parameter, lr, decoupled=True)
        return kept if decoupled else kept * abs(gradient_ratio(parameter))

    @override
    def decay_is_decoupled(self, optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
        return "scale_parameter" not in group  # which transformers' has


def _one(factor: float) -> float:
    return 1.0 if isclose(factor, 1.0, rel_tol=ROUNDING) else factor


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
    other_classes = ("SGDScheduleFree",)  # of schedulefree; decay is a part of the gradient, at y

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
    torch_classes: ClassVar[tuple[str, ...]] = ("Muon",)
    decoupled_decay = ("*",)

    @override
    def lr(self, parameter: ParameterPlan, lr_units: str) -> float:
        return parameter.depth_lr / gradient_ratio(parameter)


@register
class MuonMatched(Muon):
    """Muon whose steps are multiplied to have an RMS of 0.2 lr, as AdamW's have, whatever the shape.

    Its rate is then in AdamW's units, and one serves both (Liu et al., arXiv 2502.16982, section 2.2):

        "standard"     lr(S) = relative_lr · |multiplier| / r      the relative step that it had
        "umup"         lr(S) = ¼ · depth_lr · stored

    An orthogonal n × n matrix of RMS 1 has the spectral norm n^½, as a weight drawn at random has, up to 2: so U takes
    steps of the same share at any width, where Adam's, which line up, have the norm n and need n^-½. At the rate η each
    singular value of a step is η/20 of the RMS of the weight's own. The ¼ is measured, on small language models: there
    Muon and AdamW both have their best rate at η = 1. For rates in ordinary units, twice that step is still useful, so
    `largest_eta` counts it as one of η (recipes/results.md, "Muon").
    """

    name = "muon_matched"
    condition = "it orthogonalises the gradient, to steps of AdamW's RMS"
    torch_classes = ()
    rates = "muon"
    at_eta = 0.25

    @override
    def lr(self, parameter: ParameterPlan, lr_units: str) -> float:
        if lr_units == "standard":
            return parameter.eta_limit * parameter.relative_lr * abs(parameter.multiplier) / gradient_ratio(parameter)
        return self.at_eta * parameter.depth_lr * parameter.stored

    @override
    def eta(self, parameter: ParameterPlan) -> float | None:
        return parameter.relative_lr / (2 * self.at_eta * parameter.depth_lr)


GROUP_KEY = "optimizer_family"  # of a group: its own family, where one class has several
_GROUPS_SAY: dict[str, dict[Any, str]] = {  # what groups of classes with several families say: key, value, family
    "adjust_lr_fn": {"match_rms_adamw": "muon_matched"},  # torch
    "use_muon": {True: "muon", False: "adam"},  # MuonWithAuxAdam (Jordan et al.)
    "algorithm": {"muon": "muon", "adamw": "adam", "lion": "adam"},  # dion (Ahn et al.)
    "scale_parameter": {False: "adam_sized"},  # transformers' Adafactor
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


# With any family these would be wrong, so none is to be named.
_ONE_STEP_SIZE = "it takes one step size for all parameters"
_ESTIMATED = "it estimates one step size from the gradients of all parameters, which are stored at different scales"
_OWN_LISTS = "it keeps lists of its own for each parameter group, which multipliers of parameters don't reach"
_NO_FAMILY = (_ONE_STEP_SIZE, _ESTIMATED, _OWN_LISTS)
_SHAPE = "the size of its step depends on the matrix's shape, on the steps before it, and on what it is grafted to"
# Optimizers that no family suits. Who names one for them takes the consequences.
_WHY_NOT = {
    "Adadelta": "its step is made from the size of former steps",
    "ASGD": "its decay `lambd` can't be matched to a parameter's scale",
    "Rprop": "its step sizes live in its state, where no learning rate reaches them",
    "LBFGS": _ONE_STEP_SIZE,
    **dict.fromkeys(("Prodigy", "DAdaptAdam", "DAdaptSGD", "DAdaptLion", "DAdaptAdaGrad", "DAdaptAdan"), _ESTIMATED),
    "DistributedShampoo": _OWN_LISTS,
    **dict.fromkeys(("Shampoo", "ScalableShampoo"), _SHAPE),
    **dict.fromkeys(("ScheduleFreeWrapper", "ScheduleFreeWrapperReference"), "it has groups of an optimizer in it"),
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
        f"{': ' if reason else ''}{reason}. {_way_out(type(optimizer).__name__, reason not in _NO_FAMILY)}"
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
