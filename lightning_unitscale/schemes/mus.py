"""µnit Scaling, µS (Narayan et al., ICML 2025, arXiv 2502.05967): unit scaling with few, static interventions.

Table 2 of the paper, as printed:

    weight type          input layer    final layer    hidden
    init. variance       1              1              1
    output multiplier    1              1 / fan_in     1 / √fan_in
    Adam-like LR         1              1              1 / √fan_in

and what goes with it:

    residual addition, eq. 11, fixed(τ)    x_{l+1} = √(1-τ) · x_l + √τ · f(x_l)
    learning rate, hidden layers alone     η_new = η_base · √(d_base / d_new)
      … embedding, norms, LM head          η
    weight decay                           λ, fully decoupled: the same at all widths
    norm                                   at the end of each branch (res-post-norm)
    attention                              as usual, 1/√d_head
    FP8                                    hidden linears alone: weights and activations e4m3, gradients e5m2, clipped

Here fan_in has the rate η · √(base_width / fan_in): with d_base = base_width the two rows on rates are one. Weights
have RMS 1, all else is left as it is: no constants for activations or sums. lr · weight_decay is the user's at all
widths. The factor on a branch goes into the gain of the norm at its end, where the model has one, and elsewhere into
its last weight; a·x + b·f(x) is written as a factor on the branch alone (`weighted_addition.py`).

Not the paper's. A plug-in moves no norms: a pre-norm model stays one. base_width is compared with each weight's own
fan-in, so that an mlp's second matrix, whose fan-in is larger, has a smaller rate than its first at every width (the
ratios between widths are the paper's). The paper casts without scales; here each operand keeps its power of two, which
for weights is known and for others is measured on the first step; `conf/unitscale/mus.yaml` measures never again
(`recalibrate: []`), so that it is as static.

τ. n branches leave (1-τ)^n of the variance to the embedding, and the paper chooses τ by depth: 0.4 for its models of
four layers, about 0.1 for deep ones (figure 9). Here it is 0.3 unless set. Measured (unitscale quality, llama, two
layers, one seed, 2^-4): 2.356 at τ = 0.2 and 2.374 at 0.3, where seeds differ by 0.07.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_unitscale.engine.plan.factors import Factor
from lightning_unitscale.schemes.registry import register
from lightning_unitscale.schemes.scheme import Rates, ResidualBranch, Scheme, Weight
from lightning_unitscale.schemes.weighted_addition import branch_factor

TABLE = "µnit Scaling, arXiv 2502.05967, table 2"
RESIDUAL = "µnit Scaling, arXiv 2502.05967, equation 11"


@register
@dataclass(frozen=True)
class MunitScaling(Scheme):
    """Unit scaling with few static interventions and learning rates that carry over between widths.

    Attributes:
        tau: τ, share of each branch in the variance of its residual sum, below 1; smaller for deeper models.
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
        """The output multipliers of the table above."""
        if weight.role == "hidden":
            return [Factor(weight.fan_in**-0.5, f"fan_in^-½, fan_in = {weight.fan_in}", TABLE)]
        if weight.role == "readout":
            return [Factor(1 / weight.fan_in, f"1 / fan_in, fan_in = {weight.fan_in}", TABLE)]
        return []

    def rates(self, weight: Weight) -> Rates:
        """The learning rates of the table above, for those of hidden weights to be η at base_width."""
        if weight.role == "hidden":
            cause = f"√(base_width / fan_in), base_width = {self.base_width:g}, fan_in = {weight.fan_in}"
            return Rates([Factor((self.base_width / weight.fan_in) ** 0.5, cause, TABLE)])
        return Rates()

    def branch(self, branch: ResidualBranch) -> list[Factor]:
        """√τ beside √(1-τ)."""
        factor = branch_factor(self.tau, (other.scheme.tau for other in branch.before), branch.post_norm)
        behind = ", a norm behind" if branch.post_norm else ""
        return [Factor(factor, f"τ = {self.tau:g}, {len(branch.before)} branches before{behind}", RESIDUAL)]

    def cast(self, role: str) -> str:
        """Hidden matmuls alone."""
        return "" if role == "hidden" else f"a {role}: µS casts hidden matmuls alone"
