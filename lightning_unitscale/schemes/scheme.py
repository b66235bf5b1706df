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
from lightning_unitscale.options import STORAGES, choose


@dataclass(frozen=True)
class Weight:
    """One way in which the model uses a parameter.

    Attributes:
        role: as in `engine.analysis.roles`.
        fan_in: number of terms summed into one output element; 1 where nothing is summed.
        width: size of its last dimension.
        depth: L, half the number of branches of the residual stream whose branch it is part of; 1 outside of all.
        is_tied: it has another role elsewhere, which decides how it is stored and trained.
    """

    role: str
    fan_in: int = 1
    width: int = 1
    depth: float = 1.0
    is_tied: bool = False

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
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""
    changes_training: ClassVar[bool] = True
    least_usual_rate: ClassVar[float] = 0.0
    storages: ClassVar[tuple[str, ...]] = STORAGES

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
