"""u-μP: the Unit-Scaled Maximal Update Parametrization (Blake et al., arXiv 2407.17465).

Weights have RMS 1 and explicit multipliers (Table 2 of the paper):

    hidden weight    W · fan_in^-½            learning rate η · fan_in^-½ · L^-½ inside residual branches
    readout weight   W · fan_in^-1            η · 4; tied to an embedding: W · 4 fan_in^-1, the embedding's rate
    embedding        W                        η · d_model^-½
    bias, norm gain  1                        η / width
    attention        softmax(q·k / d_head)    in place of the model's own factor
    activation f     f(x) / √E[f(z)²], z ~ N(0, 1)

Residual streams with L pairs of branches (L = half their number). Pre-norm: each branch × α/√L, the addition left
alone, which is the paper's τ rule with its common denominators multiplied out (appendix G.2.2). Post-norm: branch i ×
τ_i = α/√(L + n_attn·α_attn² + n_mlp·α_mlp²), n counting the branches before it; the norm does the dividing.

    α_mlp = r·√(2/(1+ρ²)),  α_attn = ρ·α_mlp,   r = ρ = 1

Two learning rates differ from the paper, whose models have neither gains nor biases. There all of them have η; at
η = 1 an Adam step would change a gain of 1 by 1. Here a bias or gain has the rate that a hidden weight of its width has
in folded storage, and the readout 4 times the paper's. Measured on the default pre-training job (300 steps, one seed,
held-out nats per byte, best η):  width 64: 2.01 → 1.72 (gains) → 1.64 (readout);  width 256: 1.76 → 1.56 (readout).

A readout that is the embedding too has the embedding's step, η · d_model^-½, so its 4 stands in the forward pass.
Measured (GPT-2, 300 steps, held-out nats per byte, multiplier times fan_in = 1 and 4):  width 128, η = 1: 2.376, 2.297;
3e-4 in standard units: 3.151, 2.421, untouched 2.523. (16 learns faster still, 2.358, but starts from logits so large
that a model of few tokens begins at twice the loss of guessing.)

With lr_units="standard" a learning rate `lr` gives each hidden weight the relative step that it had in the untouched
model: η = (lr / its initial RMS) · √(fan_in · L). The readout has the step of the table at the geometric mean of these
η. Keeping the readout's own step instead falls behind the untouched model as the width grows: there most of the first
change of the logits comes from the hidden weights, through a readout whose initial RMS is that of any weight, and the
readout of u-μP starts √fan_in smaller. Measured (width 256, 3e-4, one seed): untouched 1.785; readout's own step 1.996,
5 times that 1.897, the table's (27 times) 1.618.

The model's own constants (1/√d on logits, √d on embeddings, fixed residual multipliers) are absorbed: the rules above
give the total. Under SGD, learning rates are fan_in (hidden) and width (others), the gradient's own scale taken out
(μP, Yang & Hu, arXiv 2203.03466, Table 8).
"""

from __future__ import annotations

from math import sqrt

from lightning_unitscale.engine.plan.factors import Factor
from lightning_unitscale.schemes.scheme import Rates, ResidualBranch, Scheme, Weight, register

RESIDUAL_MULTIPLIER = 1.0  # r
ATTENTION_RATIO = 1.0  # ρ
ATTENTION_MULTIPLIER = 1.0
READOUT_RATE = 4.0  # a tied readout: its multiplier

TABLE = "u-μP, arXiv 2407.17465, table 2"
RESIDUAL = "u-μP, arXiv 2407.17465, appendix G.2.2"
MEASURED = "measured, see schemes/umup.py"


@register
class UMuP(Scheme):
    """The unit-scaled maximal update parametrization, for training from scratch."""

    name = "umup"
    least_usual_rate = 0.02  # about 1 is usual (figure 1)
    source = "Blake et al., u-μP: The Unit-Scaled Maximal Update Parametrization, arXiv 2407.17465"

    def weight(self, weight: Weight) -> list[Factor]:
        """The first column of the table above."""
        if weight.role == "hidden":
            return [Factor(weight.fan_in**-0.5, f"fan_in^-½, fan_in = {weight.fan_in}", TABLE)]
        if weight.role == "readout":
            tied = [Factor(READOUT_RATE, "a readout that is the embedding too", MEASURED)] if weight.is_tied else []
            return [Factor(1 / weight.fan_in, f"1 / fan_in, fan_in = {weight.fan_in}", TABLE), *tied]
        return []

    def rates(self, weight: Weight) -> Rates:
        """The second column of the table above; for SGD as in the last paragraph."""
        width = Factor(weight.width, f"width = {weight.width}", "μP, arXiv 2203.03466, table 8")
        if weight.role == "hidden":
            fan_in = Factor(weight.fan_in, f"fan_in = {weight.fan_in}", "μP, arXiv 2203.03466, table 8")
            depth = [Factor(weight.depth**-0.5, f"L^-½, L = {weight.depth:g}", TABLE)] if weight.depth != 1.0 else []
            adam = Factor(weight.fan_in**-0.5, f"fan_in^-½, fan_in = {weight.fan_in}", TABLE)
            return Rates([adam, *depth], [fan_in], depth)
        if weight.role == "readout":
            return Rates([Factor(READOUT_RATE, "a readout", MEASURED)], [width])
        if weight.is_table:
            return Rates([Factor(weight.width**-0.5, f"d_model^-½, d_model = {weight.width}", TABLE)], [width])
        larger = max(weight.fan_in, weight.width)
        return Rates([Factor(1 / larger, f"1 / width, width = {larger}", MEASURED)], [width])

    def branch(self, branch: ResidualBranch) -> list[Factor]:
        """α/√L before the addition; behind it a norm, τ."""
        alpha = self._alpha(branch.kind)
        factors = [Factor(alpha, f"α of {branch.kind} branches", RESIDUAL)] if alpha != 1.0 else []
        if not branch.post_norm:
            return [*factors, Factor(branch.depth**-0.5, f"L^-½, a stream of {2 * branch.depth:g} branches", RESIDUAL)]
        before = sum(self._alpha(kind) ** 2 for kind in branch.before)
        cause = f"1/√(L + Σα²), L = {branch.depth:g}, {len(branch.before)} branches before, a norm behind"
        return [*factors, Factor((branch.depth + before) ** -0.5, cause, RESIDUAL)]

    @staticmethod
    def _alpha(kind: str) -> float:
        alpha = RESIDUAL_MULTIPLIER * sqrt(2 / (1 + ATTENTION_RATIO**2))
        return ATTENTION_RATIO * alpha if kind == "attention" else alpha

    def sum(self, terms: int) -> list[Factor]:
        """1/√n."""
        return [Factor(terms**-0.5, f"1/√n, a sum of {terms} independent tensors", "Unit Scaling, arXiv 2303.11257")]

    def attention(self, head_dim: int) -> list[Factor]:
        """α / d_head."""
        return [Factor(ATTENTION_MULTIPLIER / head_dim, f"α / d_head, d_head = {head_dim}", TABLE)]

    def activation(self, rms: float) -> list[Factor]:
        """1/RMS."""
        return [Factor(1 / rms, f"1 / RMS {rms:.4g} of the function of normal input", "Unit Scaling, arXiv 2303.11257")]
