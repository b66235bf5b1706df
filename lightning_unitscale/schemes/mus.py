"""µnit Scaling, µS (Narayan et al., ICML 2025, arXiv 2502.05967): unit scaling with few, static interventions.

                             forward pass              learning rate under Adam
    hidden weight            W · fan_in^-½             η · √(base_width / fan_in)
    readout                  W · fan_in^-1             η
    embedding, bias, gain    W                         η
    attention                the model's own 1/√d_head
    residual addition        √(1-τ) · x + √τ · f(x)    τ fixed: one number for all depths of the stream

Weights have RMS 1, all else is left as it is: no constants for activations or sums. The rates are those of weights at
RMS 1, so that η found at base_width carries over to other widths; weight decay does not depend on them (lr ·
weight_decay is the user's). The paper builds its models with a norm at the end of each branch (res-post-norm): where
the model has it the factor goes into that norm's gain, elsewhere into the branch's last weight. τ is to fall with
depth: n branches leave (1-τ)^n of the variance to the embedding. Measured (unitscale quality, llama, one seed, 2^-4):
2.356 at τ = 0.2 and 2.374 at 0.3, no more than seeds differ by.

Not the paper's: base_width is compared with each weight's own fan-in, so that an mlp's second matrix, whose fan-in is
larger, has a smaller rate than its first at every width (the ratios between widths are the paper's).

Casts are few: operands of hidden matmuls alone; embedding and readout stay in the compute dtype. The paper casts
without scales. Here each operand keeps its power of two, which for weights is known and for others is measured on the
first step; `conf/unitscale/mus.yaml` measures never again (`recalibrate: []`), so that it is as static.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_unitscale.engine.plan.factors import Factor
from lightning_unitscale.schemes.registry import register
from lightning_unitscale.schemes.scheme import Rates, ResidualBranch, Scheme, Weight
from lightning_unitscale.schemes.weighted_addition import branch_factor

PAPER = "µnit Scaling, arXiv 2502.05967"


@register
@dataclass(frozen=True)
class MunitScaling(Scheme):
    """Unit scaling with few static interventions and learning rates that carry over between widths.

    Attributes:
        tau: τ, share of each branch in the variance of its residual sum, below 1.
        base_width: the fan-in at which hidden weights have the rate η.
    """

    name = "mus"
    source = "Narayan et al., µnit Scaling: Simple and Scalable FP8 LLM Training, arXiv 2502.05967"
    families = ("adam", "muon")
    of_weights, of_activations = ("base_width",), ("tau",)

    tau: float = 0.3
    base_width: float = 256.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.tau < 1, "tau", "below 1")

    def weight(self, weight: Weight) -> list[Factor]:
        """The first column of the table above."""
        if weight.role == "hidden":
            return [Factor(weight.fan_in**-0.5, f"fan_in^-½, fan_in = {weight.fan_in}", PAPER)]
        if weight.role == "readout":
            return [Factor(1 / weight.fan_in, f"1 / fan_in, fan_in = {weight.fan_in}", PAPER)]
        return []

    def rates(self, weight: Weight) -> Rates:
        """The second column of the table above."""
        if weight.role == "hidden":
            cause = f"√(base_width / fan_in), base_width = {self.base_width:g}, fan_in = {weight.fan_in}"
            return Rates([Factor((self.base_width / weight.fan_in) ** 0.5, cause, PAPER)])
        return Rates()

    def branch(self, branch: ResidualBranch) -> list[Factor]:
        """√τ beside √(1-τ)."""
        factor = branch_factor(self.tau, (other.scheme.tau for other in branch.before), branch.post_norm)
        behind = ", a norm behind" if branch.post_norm else ""
        return [Factor(factor, f"τ = {self.tau:g}, {len(branch.before)} branches before{behind}", PAPER)]

    def cast(self, role: str) -> str:
        """Hidden matmuls alone."""
        return "" if role == "hidden" else f"a {role}: µS casts hidden matmuls alone"
