"""Unit Scaling (Blake, Orr, Luschi, ICML 2023, arXiv 2303.11257): RMS 1 everywhere when training starts.

    hidden weight, readout   W · fan_in^-½
    embedding, bias, gain    as they are, weights at RMS 1
    attention                softmax(q·k / √d_head)
    activation f             f(x) / √E[f(z)²], z ~ N(0, 1)
    sum of n tensors         1/√n on each (section 5.3, weighted addition)
    residual addition l      √(l/(l+1)) · x + √(1/(l+1)) · f(x), l = 1, 2, …      running mean, or
                             √(1-τ) · x + √τ · f(x)                               where `tau` is given
    learning rate            η, the same for all

The running mean gives the embedding and each branch one share: as a function it is the plain sum x + f(x) of branches
at RMS 1, up to the norm at the end of the stream. A rate η for weights at RMS 1 has no rule for width or depth: the
best one is another at every width. With lr_units="standard" a learning rate means what it meant for the untouched
model.

The paper scales gradients too, by constants of their own where a product's operands are used once. Here gradients are
the true ones of the scaled function; Adam does not see the difference, and casts to narrow formats have scales for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_unitscale.engine.plan.factors import Factor
from lightning_unitscale.schemes.registry import register
from lightning_unitscale.schemes.scheme import Rates, ResidualBranch, Scheme, Weight
from lightning_unitscale.schemes.weighted_addition import branch_factor

PAPER = "Unit Scaling, arXiv 2303.11257"


@register
@dataclass(frozen=True)
class Unit(Scheme):
    """Unit scaling without rules for learning rates.

    Attributes:
        tau: share of each branch in the variance of its residual sum, below 1; None: a running mean.
    """

    name = "unit"
    source = "Blake, Orr, Luschi, Unit Scaling: Out-of-the-Box Low-Precision Training, arXiv 2303.11257"
    families = ("adam", "muon")
    of_activations = ("tau",)

    tau: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.tau is None or self.tau < 1, "tau", "below 1")

    def weight(self, weight: Weight) -> list[Factor]:
        """fan_in^-½."""
        if weight.role in ("hidden", "readout"):
            return [Factor(weight.fan_in**-0.5, f"fan_in^-½, fan_in = {weight.fan_in}", PAPER)]
        return []

    def rates(self, weight: Weight) -> Rates:
        """η."""
        return Rates()

    def branch(self, branch: ResidualBranch) -> list[Factor]:
        """A running mean, or τ."""
        n, behind = len(branch.before), ", a norm behind" if branch.post_norm else ""
        earlier = [other.scheme.share(position) for position, other in enumerate(branch.before)]
        factor = branch_factor(self.share(n), earlier, branch.post_norm)
        rule = "running mean" if self.tau is None else f"τ = {self.tau:g}"
        return [Factor(factor, f"{rule}, {n} branches before{behind}", PAPER)]

    def share(self, position: int) -> float:
        """Of the branch at a position, from 0, in the variance of its residual sum."""
        return 1 / (position + 2) if self.tau is None else self.tau

    def sum(self, terms: int) -> list[Factor]:
        """1/√n."""
        return [Factor(terms**-0.5, f"1/√n, a sum of {terms} independent tensors", PAPER)]

    def attention(self, head_dim: int) -> list[Factor]:
        """1/√d_head."""
        return [Factor(head_dim**-0.5, f"1/√d_head, d_head = {head_dim}", PAPER)]

    def activation(self, rms: float) -> list[Factor]:
        """1/RMS."""
        return [Factor(1 / rms, f"1 / RMS {rms:.4g} of the function of normal input", PAPER)]
