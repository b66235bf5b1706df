"""Unit Scaling (Blake, Orr, Luschi, ICML 2023, arXiv 2303.11257): RMS 1 everywhere when training starts.

Table A.2 of the paper (read in a summary of it); X is [b, m], W [m, n]; α on an operation's output, β on gradients:

    operation                        α                           gradients
    matmul X W                       m^-½                        β_X = n^-½, β_W = b^-½
      … constrained                  α = β_X = (m n)^-¼, the geometric mean of both; β_W = b^-½
    sum of n elements                n^-½
    relu                             √(2 / (1 - 1/π)) = 1.713    1 / std of the function of z ~ N(0, 1)
    gelu, tanh, sigmoid              1.701, 1.593, 4.802         the same
    softmax over s elements          s
    residual addition l              √(1-τ) · x + √τ · f(x)      fixed τ, or
                                     √(l/(l+1)) · x + √(1/(l+1)) · f(x), l = 1, 2, …   running mean
    learning rate                    η, the same for all

Here:

    hidden weight, readout           m^-½, m = fan_in, gradients true; weights at RMS 1
    embedding, bias, gain            as they are, weights at RMS 1
    sum of n tensors                 n^-½ on each
    activation f                     1 / √E[f(z)²]
    attention                        softmax(q·k / √d_head)
    residual addition                as in the table: `tau`, or the running mean where it is None

Where that differs, and why. Gradients are the true ones of the scaled function, without a β of their own: Adam does not
see the difference, and casts to narrow formats have scales for it; so α needs no compromise with β_X, and is m^-½
everywhere, as in u-μP. Activations are brought to RMS 1 and not to a standard deviation of 1, since what a cast and the
next product see is the mean with the rest: √2 in place of 1.713 for relu, 1.534 in place of 1.701 for gelu, and the
same for tanh, which has no mean. What a softmax or a sigmoid makes is left alone: it is a probability or a gate to
somebody, and attention's weights times s would depend on the length of the sequence.

The running mean gives the embedding and each branch one share: as a function it is the plain sum x + f(x) of branches
at RMS 1, up to the norm at the end of the stream. A rate η for weights at RMS 1 has no rule for width or depth: the
best one is another at every width. With lr_units="standard" a learning rate means what it meant for the untouched
model.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_unitscale.engine.plan.factors import Factor
from lightning_unitscale.schemes.registry import register
from lightning_unitscale.schemes.scheme import Rates, ResidualBranch, Scheme, Weight
from lightning_unitscale.schemes.weighted_addition import branch_factor

TABLE = "Unit Scaling, arXiv 2303.11257, table A.2"


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
            return [Factor(weight.fan_in**-0.5, f"fan_in^-½, fan_in = {weight.fan_in}", TABLE)]
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
        return [Factor(factor, f"{rule}, {n} branches before{behind}", TABLE)]

    def share(self, position: int) -> float:
        """Of the branch at a position, from 0, in the variance of its residual sum."""
        return 1 / (position + 2) if self.tau is None else self.tau

    def sum(self, terms: int) -> list[Factor]:
        """1/√n."""
        return [Factor(terms**-0.5, f"1/√n, a sum of {terms} independent tensors", TABLE)]

    def attention(self, head_dim: int) -> list[Factor]:
        """1/√d_head."""
        return [Factor(head_dim**-0.5, f"1/√d_head, d_head = {head_dim}", TABLE)]

    def activation(self, rms: float) -> list[Factor]:
        """1/RMS."""
        return [Factor(1 / rms, f"1 / RMS {rms:.4g} of the function of normal input", TABLE)]
