"""What an optimizer's hyperparameters are multiplied by for each parameter, and who knows it: the optimizer's family.

The function sees F = multiplier · U and S = stored · U is kept, so the gradient of S is r = multiplier/stored times
that of F, and a step of S is a step of F divided by r. Which learning rate makes that step depends on how an update
answers to a gradient r times as large. That is what a `Family` says; the families are in `optim.families`. Weight
decay keeps its strength on F with any of them, or has the one that the scheme gives it:

    decoupled, beside the gradient     decay(S) = decay / (factor on lr)     lr · decay: as it was, × the scheme's, ×
                                                                              the limit on the user's own rate
    coupled, a part of the gradient    decay(S) = r² · decay                 decay(S) · S is r times decay · F

A gradient that the optimizer sees divided by its own scale is the same for S and F, and of r² one r is left. So it is
where a family's update answers to the gradient's scale in no fixed way: such an optimizer is shown the gradient of F.

(u-μP, arXiv 2407.17465, sections 2.1 and 3.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isclose
from typing import Any, ClassVar, TypeVar

import torch
from torch.optim import Optimizer

from lightning_unitscale.engine.plan.factors import ROUNDING
from lightning_unitscale.engine.plan.parameter_plan import ParameterPlan
from lightning_unitscale.errors import UnitScalingError


@dataclass(frozen=True)
class StepScale:
    """Factors on one parameter's optimizer hyperparameters, as a scheme gives them; 1 leaves a hyperparameter alone.

    Attributes:
        lr: factor on the learning rate.
        weight_decay: factor on the weight decay coefficient, which the optimizer still multiplies by the scaled `lr`.
        eps: factor on eps, in units of the gradient.
        floor: factor on a second eps, in units of the parameter, where the optimizer's eps is such a pair.
        gradient: factor on the gradient while the optimizer looks at it.
    """

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    floor: float = 1.0
    gradient: float = 1.0

    def factors(self, group: Mapping[str, Any]) -> dict[str, float | tuple[float, float]]:
        """The factor on each hyperparameter of a group, and on what an optimizer that averages remembers of its rates.

        A schedule-free optimizer weighs step k by (largest rate until k)^power, and keeps that rate and the sum of the
        weights in the group (Defazio et al., arXiv 2405.15682; `schedulefree`). They follow the rate.
        """
        eps = (self.eps, self.floor) if isinstance(group.get("eps"), (tuple, list)) else self.eps
        factors = {"lr": self.lr, "weight_decay": self.weight_decay, "eps": eps}
        if "weight_lr_power" in group:
            factors |= {"scheduled_lr": self.lr, "lr_max": self.lr, "weight_sum": self.lr ** group["weight_lr_power"]}
        return factors


PLAIN = StepScale()


class Family(ABC):
    """Optimizers whose updates answer alike to the scale of a gradient; a subclass is known once it is `register`ed.

    Attributes:
        name: what it is called in options, plans and messages.
        condition: when an optimizer belongs to it, as an error message says it.
        torch_classes: names of its classes in `torch.optim`.
        other_classes: names of classes of other packages. A subclass of any of them belongs to the family too.
        decoupled_decay: which classes' weight decay acts beside the gradient, as globs of their names.
        rates: the family whose rates of a scheme it uses; default: its own.
        sees_function: its update answers to the gradient's scale in no fixed way, so it is shown the gradient of F.
    """

    name: ClassVar[str]
    condition: ClassVar[str]
    torch_classes: ClassVar[tuple[str, ...]] = ()
    other_classes: ClassVar[tuple[str, ...]] = ()
    decoupled_decay: ClassVar[tuple[str, ...]] = ()
    rates: ClassVar[str] = ""
    sees_function: ClassVar[bool] = False

    @abstractmethod
    def lr(self, parameter: ParameterPlan, lr_units: str) -> float:
        """Factor on the learning rate of what is stored.

        Args:
            parameter: its constants, as a scheme gave them.
            lr_units: "standard" | "umup".
        """

    def eta(self, parameter: ParameterPlan) -> float | None:
        """η of a learning rate of 1 in ordinary units, for a hidden weight; None where no rate is too large."""
        return None

    def eps(self, parameter: ParameterPlan) -> float:
        """Factor on eps; 1 where the family has none that has the gradient's unit."""
        return 1.0

    def floor(self, parameter: ParameterPlan, lr_units: str) -> float:
        """Factor on a second eps that has the parameter's unit."""
        return 1.0

    def decay(self, parameter: ParameterPlan, lr: float, *, decoupled: bool) -> float:
        """Factor on weight decay, where that on the learning rate is `lr`."""
        if decoupled:
            return parameter.decay * parameter.eta_limit / lr if lr else 1.0
        return gradient_ratio(parameter) * self.seen_ratio(parameter)

    def seen_ratio(self, parameter: ParameterPlan) -> float:
        """How large the gradient that the optimizer sees is beside that of F, or beside F's as it would be seen."""
        return 1.0 if parameter.divided_gradient or self.sees_function else gradient_ratio(parameter)

    def step_scale(self, parameter: ParameterPlan, lr_units: str, *, decoupled_decay: bool) -> StepScale:
        """All factors of one parameter; a learning-rate multiplier that the user has set takes the place of ours."""
        lr = self.lr(parameter, lr_units) if parameter.lr_override is None else parameter.lr_override
        lr = 1.0 if isclose(lr, 1.0, rel_tol=ROUNDING) else lr
        decay = self.decay(parameter, lr, decoupled=decoupled_decay)
        shown = self.sees_function and not parameter.divided_gradient
        gradient = 1.0 / gradient_ratio(parameter) if shown else 1.0
        return StepScale(lr, decay, self.eps(parameter), self.floor(parameter, lr_units), gradient)

    def includes(self, cls: type) -> bool:
        """Whether the family has this very class; its subclasses are not looked for."""
        name = cls.__name__
        return name in self.other_classes or (name in self.torch_classes and getattr(torch.optim, name, None) is cls)

    def decay_is_decoupled(self, optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
        """Whether weight decay acts beside the gradient in one of the optimizer's groups."""
        if "decoupled_weight_decay" in group:
            return bool(group["decoupled_weight_decay"])
        if hasattr(optimizer, "adam_w_mode"):  # apex and DeepSpeed
            return bool(optimizer.adam_w_mode)
        names = [cls.__name__ for cls in type(optimizer).__mro__]
        return any(fnmatchcase(name, glob) for name in names for glob in self.decoupled_decay)


def gradient_ratio(parameter: ParameterPlan) -> float:
    """r: how large the gradient of what is stored is beside that of what the function sees."""
    return parameter.multiplier / parameter.stored if parameter.stored else 1.0


def check_has_rates(scheme: str, families: Collection[str], family: str, lr_units: str) -> None:
    """
    Raises:
        UnitScalingError: learning rates are in the scheme's own units, and it has none for optimizers of the family.
    """
    if lr_units == "umup" and (FAMILIES[family].rates or family) not in families:
        raise UnitScalingError(
            f"scheme={scheme!r} has no learning rates of its own for optimizers of the family {family!r}, only for "
            f"{' and '.join(map(repr, families))}. Use one of those, or lr_units='standard'."
        )


FAMILIES: dict[str, Family] = {}  # by name
_Class = TypeVar("_Class", bound=type[Family])


def register(family: _Class) -> _Class:
    """Class decorator: makes a family known, by its name and to optimizers of its classes."""
    FAMILIES[family.name] = family()
    return family
