"""What a scheme is: pure rules for the constants of a model, found by name.

A scheme says what function is trained, with what step sizes. It is asked about one weight, branch, sum, attention or
activation at a time and answers with factors; `planner` finds these places in any model, pushes factors back to the
weights that can take them, and writes the plan. A rule never sees a tensor.

Each answer is a list of `Factor`s, whose product is the constant: an empty list stands for 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from lightning_unitscale.engine.plan.factors import Factor
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.options import STORAGES, Options, choose


@dataclass(frozen=True)
class Weight:
    """One way in which the model uses a parameter.

    Attributes:
        role: as in `engine.analysis.roles`.
        fan_in: number of terms summed into one output element; 1 where nothing is summed.
        width: size of its last dimension.
        depth: L, half the number of branches of the residual stream whose branch it is part of; 1 outside of all.
        is_tied: it has another role elsewhere, which decides how it is stored and trained.
        largest: max|θ| of its initial value.
        elements: how many it has.
    """

    role: str
    fan_in: int = 1
    width: int = 1
    depth: float = 1.0
    is_tied: bool = False
    largest: float = 0.0
    elements: int = 1

    @property
    def is_table(self) -> bool:
        """Whether its rows are taken as they are: looked up, added, joined."""
        return self.role in ("embedding", "position", "token")


@dataclass(frozen=True)
class ResidualBranch:
    """One branch of a residual addition.

    Attributes:
        kind: "attention" or "mlp".
        depth: L, half the number of branches of its stream; parallel ones are counted each.
        before: kinds of the branches added before it in its stream, those of its own addition not among them.
        post_norm: the sum is normalised before it is anybody's skip.
    """

    kind: str
    depth: float
    before: tuple[str, ...] = ()
    post_norm: bool = False


@dataclass(frozen=True)
class Rates:
    """Learning rates of a weight at RMS 1, in units of the scheme's η.

    Attributes:
        adam: for updates that do not depend on the gradient's scale.
        sgd: for updates in proportion to it.
        depth: what of `adam` comes from depth; all that a matrix-wise normalised update (Muon) needs.
    """

    adam: list[Factor] = field(default_factory=list)
    sgd: list[Factor] = field(default_factory=list)
    depth: list[Factor] = field(default_factory=list)


class Scheme(ABC):
    """Pure rules. Name a subclass, import its file in `schemes/__init__.py`, and it can be asked for.

    Attributes:
        name: what users write: `UnitScaling(scheme=…)`.
        source: the paper.
        changes_training: False for a scheme that leaves weights, function and learning rates alone; it is then asked
            for nothing, and the first loss must equal the untouched model's bit for bit.
        least_usual_rate: an η below it is taken for a rate in ordinary units, and warned of; 0 warns of none.
        storages: those that it can be kept in.
        families: the optimizer families that it has a rule for; empty for all.
        own_options: those of `Options` that are for this scheme alone; None in others.
        on_top: its factors come on top of what the model has: the model's own constants stay where they are, U is the
            initial value times `initial`, and every weight keeps the relative step that it had.
        keeps_function: the factors of each weight and activation undo each other, and the function is the model's own.
        divides_gradients: the optimizer is to see each gradient divided by γ = max|gradient| / √d.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""
    changes_training: ClassVar[bool] = True
    least_usual_rate: ClassVar[float] = 0.0
    storages: ClassVar[tuple[str, ...]] = STORAGES
    families: ClassVar[tuple[str, ...]] = ()
    own_options: ClassVar[tuple[str, ...]] = ()
    on_top: ClassVar[bool] = False
    divides_gradients: ClassVar[bool] = False
    keeps_function: bool = False

    def with_options(self, options: Options) -> Scheme:
        """The scheme as its own options have it."""
        return self

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

    def activation(self, rms: float) -> list[Factor]:
        """On the output of an elementwise function whose RMS is `rms` for normal input of RMS 1."""
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


SCHEMES: dict[str, Scheme] = {}


def register(scheme: type[Scheme]) -> type[Scheme]:
    """Make a scheme known by its name; a class decorator."""
    SCHEMES[scheme.name] = scheme()
    return scheme


def find(name: str) -> Scheme:
    """The scheme of that name.

    Raises:
        UnitScalingError: there is none; the message lists those there are.
    """
    choose("scheme", name, tuple(SCHEMES))
    return SCHEMES[name]


def scheme_of(options: Options) -> Scheme:
    """The scheme that the options ask for, as they have it.

    Raises:
        UnitScalingError: there is none of that name, or it lacks the storage or an option that was given.
    """
    scheme = find(options.scheme)
    if options.storage not in scheme.storages:
        known = " or ".join(map(repr, scheme.storages))
        raise UnitScalingError(f"scheme={scheme.name!r} has no storage={options.storage!r}; choose {known}.")
    for name in {name for other in SCHEMES.values() for name in other.own_options} - {*scheme.own_options}:
        if getattr(options, name) is not None:
            theirs = [other.name for other in SCHEMES.values() if name in other.own_options]
            raise UnitScalingError(
                f"{name}={getattr(options, name)!r} is an option of scheme={' and '.join(map(repr, theirs))}, and "
                f"scheme={scheme.name!r} has no such choice. Leave it out, or name that scheme."
            )
    return scheme.with_options(options)
