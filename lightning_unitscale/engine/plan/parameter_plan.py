"""What a plan says of one parameter; `plan` has the meaning of its constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isclose

from lightning_unitscale.engine.plan.factors import ROUNDING, Factor, product

FROZEN = "frozen"
UNUSED = "no torch call of the recorded step used it"


@dataclass
class ParameterPlan:
    """One parameter.

    Attributes:
        name: its first name in the module.
        role: see `engine.analysis.roles`.
        shape: as recorded; a plan is refused for a model whose shapes differ.
        initial_rms: RMS before anything was changed.
        initial_factor: what its initial value was multiplied by to become U (1/RMS for scaled roles).
        multiplier: from U to F at its primary use, with every foldable factor of a neighbour.
        stored: from U to what is kept.
        unit_lr: learning rate of U under an Adam-like optimizer, in units of η.
        sgd_lr: the same under SGD with true gradients.
        relative_lr: learning rate of F in units of the user's own ("standard") is this times |multiplier|.
        step_limit: factor on that, from what one step of an Adam-like optimizer does to the loss of the first batch.
        sgd_step_limit: the same for SGD.
        eta_limit: factor on it, where an Adam-like optimizer's own rates are larger than the scheme has use for.
        divided_gradient: the optimizer sees its gradient divided by γ = max|gradient| / √d, d its number of elements.
        depth_lr: the part of `unit_lr` that comes from depth (L^-½ inside a residual branch).
        unit_eps: Adam's eps for the gradient of U, in units of the user's; None: the user's is for that of F.
        decay: factor on lr · weight_decay, where decay acts beside the gradient.
        causes: where the constants above come from, by their names: the factors of each.
        lr_override: set by the user; takes the place of every learning-rate multiplier.
        stored_whole: a hand-written autograd.Function uses it, whose backward pass would not see an explicit factor, so
            its own multiplier is stored in either storage.
        fixed: it enters the function through an expression, so its stored scale is kept and factors stay explicit.
        reason: why it is left alone; empty when it is scaled.
    """

    name: str
    role: str
    shape: list[int]
    initial_rms: float = 0.0
    initial_factor: float = 1.0
    multiplier: float = 1.0
    stored: float = 1.0
    unit_lr: float = 1.0
    sgd_lr: float = 1.0
    relative_lr: float = 1.0
    step_limit: float = 1.0
    sgd_step_limit: float = 1.0
    eta_limit: float = 1.0
    depth_lr: float = 1.0
    unit_eps: float | None = None
    decay: float = 1.0
    causes: dict[str, list[Factor]] = field(default_factory=dict)
    lr_override: float | None = None
    aliases: list[str] = field(default_factory=list)
    stored_whole: bool = False
    fixed: bool = False
    divided_gradient: bool = False
    reason: str = ""

    @property
    def from_initial(self) -> float:
        """What is stored, divided by the initial value: S = W · from_initial."""
        factor = 1.0 if self.fixed else self.initial_factor * self.stored
        return 1.0 if isclose(factor, 1.0, rel_tol=ROUNDING) else factor

    def set_constant(self, name: str, factors: Sequence[Factor]) -> None:
        """Give one of the constants above its value, and remember why."""
        setattr(self, name, product(factors))
        self.causes[name] = list(factors)
