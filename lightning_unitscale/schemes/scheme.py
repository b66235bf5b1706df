"""What a scheme is: pure rules for the constants of a model, with hyperparameters.

A scheme says what function is trained, with what step sizes. It is asked about one weight, branch, sum, attention or
activation at a time and answers with factors; `planner` finds these places in any model, pushes factors back to the
weights that can take them, and writes the plan. A rule never sees a tensor.

Each answer is a list of `Factor`s, whose product is the constant: an empty list stands for 1.

A scheme's hyperparameters are the fields of its class, a frozen dataclass. Where `overrides` give a part of the model
other values, the same class with those values is asked about that part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any, ClassVar, Literal

from lightning_unitscale.engine.plan.factors import Factor
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.options import STORAGES

Outputs = Literal["logits", "odds", "targets"]


@dataclass(frozen=True)
class Weight:
    """One way in which the model uses a parameter.

    Attributes:
        role: as in `engine.analysis.roles`.
        fan_in: number of terms summed into one output element; 1 where nothing is summed.
        width: size of its last dimension.
        depth: L, half the number of branches of the residual stream whose branch it is part of; 1 outside of all.
        is_tied: it has another role elsewhere, which decides how it is stored and trained.
        in_branch: it is part of a residual branch.
        largest: max|θ| of its initial value.
        elements: how many it has.
        outputs: of a readout, what it makes: "logits", which a softmax takes, "odds", which a sigmoid takes, or a
            softmax of two, or "targets"; of any other, "logits" if all readouts make these, and none is tied.
    """

    role: str
    fan_in: int = 1
    width: int = 1
    depth: float = 1.0
    is_tied: bool = False
    in_branch: bool = False
    largest: float = 0.0
    elements: int = 1
    outputs: Outputs = "targets"

    @property
    def is_table(self) -> bool:
        """Whether its rows are taken as they are: looked up, added, joined."""
        return self.role in ("embedding", "position", "token")


@dataclass(frozen=True)
class EarlierBranch:
    """A branch that was added to a residual stream before another one.

    Attributes:
        kind: "attention" or "mlp".
        scheme: the scheme with the hyperparameters that hold for it.
    """

    kind: str
    scheme: Any


@dataclass(frozen=True)
class ResidualBranch:
    """One branch of a residual addition.

    Attributes:
        kind: "attention" or "mlp".
        depth: L, half the number of branches of its stream; parallel ones are counted each.
        before: the branches added before it in its stream, those of its own addition not among them.
        post_norm: the sum is normalised before it is anybody's skip.
    """

    kind: str
    depth: float
    before: tuple[EarlierBranch, ...] = ()
    post_norm: bool = False


@dataclass(frozen=True)
class Rates:
    """Learning rates of a weight at RMS 1, in units of the scheme's η.

    Attributes:
        adam: for updates that do not depend on the gradient's scale.
        sgd: for updates in proportion to it.
        depth: what of `adam` comes from depth; all that a matrix-wise normalised update (Muon) needs.
        standard: on the relative step that it had, with `lr_units="standard"`; a readout takes `adam` instead.
        eps: Adam's, for the gradient of the weight at RMS 1, in units of the user's; None: the user's is for the
            gradient of what the function sees.
        decay: on lr · weight_decay, where decay acts beside the gradient.
    """

    adam: list[Factor] = field(default_factory=list)
    sgd: list[Factor] = field(default_factory=list)
    depth: list[Factor] = field(default_factory=list)
    standard: list[Factor] = field(default_factory=list)
    eps: list[Factor] | None = None
    decay: list[Factor] = field(default_factory=list)


@dataclass(frozen=True)
class Scheme(ABC):
    """Pure rules. Name a subclass, import its file in `schemes/__init__.py`, and it can be asked for.

    Fields of the subclass are its hyperparameters, each with a default: numbers above 0, True and False, or
    None for a rule without a number.

    Attributes:
        name: what users write: `UnitScaling(scheme=…)`.
        source: the paper.
        changes_training: False for a scheme that leaves weights, function and learning rates alone; it is then asked
            for nothing, and the first loss must equal the untouched model's bit for bit.
        least_usual_rate: an η below it is taken for a rate in ordinary units, and warned of; 0 warns of none.
        families: of optimizers that it has learning rates for; others need `lr_units="standard"`.
        storages: those that it can be kept in.
        of_the_whole: the hyperparameters that no override can set for a part of the model.
        of_weights, of_activations: those that decide nothing with `weights=False`, or `activations=False`.
        on_top: its factors come on top of what the model has: the model's own constants stay where they are, U is the
            initial value times `initial`, and every weight keeps the relative step that it had.
        divides_gradients: the optimizer is to see each gradient divided by γ = max|gradient| / √d.

    Raises:
        UnitScalingError: a hyperparameter has another kind of value than its default.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""
    changes_training: ClassVar[bool] = True
    least_usual_rate: ClassVar[float] = 0.0
    families: ClassVar[tuple[str, ...]] = ("adam", "sgd", "muon")
    storages: ClassVar[tuple[str, ...]] = STORAGES
    of_the_whole: ClassVar[tuple[str, ...]] = ()
    of_weights: ClassVar[tuple[str, ...]] = ()
    of_activations: ClassVar[tuple[str, ...]] = ()
    on_top: ClassVar[bool] = False
    divides_gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for known in fields(self):
            value = getattr(self, known.name)
            if value is None and known.default is None:
                continue
            if isinstance(known.default, bool):
                self._require(isinstance(value, bool), known.name, "True or False")
                continue
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            self._require(is_number and isfinite(value) and value > 0, known.name, "a number above 0")
            object.__setattr__(self, known.name, float(value))

    def _require(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise UnitScalingError(
                f"hyperparameters: {name}={getattr(self, name)!r} of scheme={self.name!r} must be {what}."
            )

    @property
    def keeps_function(self) -> bool:
        """Whether the factors of each weight and activation undo each other: the function is the model's own."""
        return False

    def most_useful_rate(self) -> float | None:
        """The η beyond which no optimizer's rate is to go where learning rates have their ordinary meaning, if any."""
        return None

    def hyperparameter(self, name: str) -> list[Factor]:
        """A hyperparameter as a factor; none at 1."""
        value = getattr(self, name)
        return [] if value == 1.0 else [Factor(value, name, "hyperparameters")]

    @abstractmethod
    def weight(self, weight: Weight) -> list[Factor]:
        """From the weight at RMS 1 to the one in the model's function, before anything is folded into it."""

    @abstractmethod
    def rates(self, weight: Weight) -> Rates:
        """Learning rates of the weight at RMS 1."""

    def branch(self, branch: ResidualBranch) -> list[Factor]:
        """On the output of a residual branch."""
        return []

    def sum(self, terms: int) -> list[Factor]:
        """On each of independent tensors that are added, where no norm follows."""
        return []

    def attention(self, head_dim: int) -> list[Factor] | None:
        """On attention logits, in place of the model's own constant; None leaves that."""
        return None

    def begins_smaller(self) -> dict[str, float]:
        """Hyperparameters for a model whose first loss is too large: with them its outputs begin smaller.

        Empty where the scheme has none, or has them already.
        """
        return {}

    def cast(self, role: str) -> str:
        """Why, with a `format`, matmuls with a weight of that role stay in the compute dtype; "" if they are cast."""
        return ""

    def activation_input(self) -> list[Factor]:
        """On the input of an elementwise function."""
        return []

    def activation(self, rms: float) -> list[Factor]:
        """On the output of an elementwise function, whose RMS is `rms` for normal input times `activation_input`."""
        return []

    def initial(self, weight: Weight) -> list[Factor]:
        """From the initial value to U; asked of a scheme that is `on_top`, others have U at RMS 1."""
        return []

    def seen_activation(self, largest: float, features: int) -> list[Factor]:
        """On the output of an elementwise function, by what it was in the recorded step.

        Args:
            largest: of the magnitudes of its elements.
            features: size of its feature dimension.

        A scheme that keeps the function has it undone in the weights that take it, and left alone where none does. In
        any other one the factor follows each call's own output, as `ops.max_scale` has it.
        """
        return []
