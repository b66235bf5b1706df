"""u-μP: the Unit-Scaled Maximal Update Parametrization (Blake et al., arXiv 2407.17465).

Weights have RMS 1 and explicit multipliers (Table 2 of the paper; p = ½):

    hidden weight    W · fan_in^-½              learning rate η · fan_in^-½ · L^(p-1) inside residual branches
    readout weight   W · α_out / fan_in         η · η_out; tied to an embedding: W · η_out α_out / fan_in, its rate
    embedding        W                          η · η_emb · d_model^-½
    bias, norm gain  1                          η / width
    attention        softmax(α_attn q·k/d_head) in place of the model's own factor
    activation f     f(α x) / √E[f(α z)²]       z ~ N(0, 1), α = α_ffn_act

Residual streams with L pairs of branches (L = half their number). Pre-norm: each branch × α/L^p, the addition left
alone, which is the paper's τ rule with its common denominators multiplied out (appendix G.2.2). Post-norm: branch i ×
τ_i = α/√(L^2p + Σα²), the sum over the branches before it; the norm does the dividing.

    α_mlp = r·√(2/(1+ρ²)),  α_attn = ρ·α_mlp,   r = α_res,  ρ = α_res_attn_ratio

These αs are the paper's hyperparameters (its table 3); all are 1 unless set, and none changes with size. α_out is its
α_loss-softmax, a multiplier of the logits. Two more are of learning rates, η_emb = 1 and η_out = 4, and p =
depth_exponent is the rule for depth: ½, the paper's, keeps a sum of independent branches at RMS 1; 1, that of CompleteP
(arXiv 2505.01618), one of branches that are all alike, and its learning rates do not depend on depth.

Two learning rates differ from the paper, whose models have neither gains nor biases. There all of them have η; at
η = 1 an Adam step would change a gain of 1 by 1. Here a bias or gain has the rate that a hidden weight of its width has
in folded storage, and the readout η_out = 4 times the paper's. Measured on the default pre-training job (300 steps, one
seed, held-out nats per byte, best η):  width 64: 2.01 → 1.72 (gains) → 1.64 (readout);  width 256: 1.76 → 1.56
(readout).

A readout that is the embedding too has the embedding's step, η · d_model^-½, so η_out stands in the forward pass.
Measured (GPT-2, 300 steps, held-out nats per byte, multiplier times fan_in = 1 and 4):  width 128, η = 1: 2.376, 2.297;
3e-4 in standard units: 3.151, 2.421, untouched 2.523. (16 learns faster still, 2.358, but starts from logits so large
that a model of few tokens begins at twice the loss of guessing.)

With lr_units="standard" a learning rate `lr` gives each hidden weight the relative step that it had in the untouched
model: η = (lr / its initial RMS) · √(fan_in · L). The readout has the step of the table at the geometric mean of these
η. Keeping the readout's own step instead falls behind the untouched model as the width grows: there most of the first
change of the logits comes from the hidden weights, through a readout whose initial RMS is that of any weight, and the
readout of u-μP starts √fan_in smaller. Measured (width 256, 3e-4, one seed): untouched 1.785; readout's own step 1.996,
5 times that 1.897, the table's (27 times) 1.618. A matrix that starts at zero has the user's own step. What a step of
these rates does to the loss of the first batch is then limited: see `schemes.step_limits`.

The model's own constants (1/√d on logits, √d on embeddings, fixed residual multipliers) are absorbed: the rules above
give the total. Under SGD, learning rates are fan_in (hidden) and width (others), the gradient's own scale taken out
(μP, Yang & Hu, arXiv 2203.03466, Table 8).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt

from lightning_unitscale.engine.plan.factors import Factor
from lightning_unitscale.schemes.registry import register
from lightning_unitscale.schemes.scheme import Rates, ResidualBranch, Scheme, Weight

TABLE = "u-μP, arXiv 2407.17465, table 2"
RESIDUAL = "u-μP, arXiv 2407.17465, appendix G.2.2"
COMPLETEP = "CompleteP, arXiv 2505.01618, table 1"
SGD = "μP, arXiv 2203.03466, table 8"
MEASURED = "measured, see schemes/umup.py"


@register
@dataclass(frozen=True)
class UMuP(Scheme):
    """The unit-scaled maximal update parametrization, for training from scratch.

    Attributes:
        alpha_attn: on attention logits.
        alpha_ffn_act: how sharply activation functions bend: f(α x) in place of f(x), at RMS 1. ReLU does not change.
        alpha_res: size of what all branches add, beside the stream that they are added to.
        alpha_res_attn_ratio: size of attention branches beside the others.
        alpha_out: on the logits.
        alpha_tied: the same where the readout is the embedding too.
        eta_emb, eta_out: learning rates of embeddings and readouts beside those of the table.
        base_depth: pairs of branches up to which branches and their rates have L^-½, as in the paper.
        depth_exponent: p of what deeper ones have beyond: branches (L / base_depth)^-p, rates ^(p-1); the paper has ½.
        attn_exponent: p of the factor d_head^-p on attention logits; the paper's is 1.
        readout_exponent: p of the readout's multiplier fan_in^-p; the paper's is 1.
    """

    name = "umup"
    of_weights = ("alpha_out", "alpha_tied", "eta_emb", "eta_out", "readout_exponent")
    of_activations = ("alpha_attn", "attn_exponent", "alpha_ffn_act", "alpha_res", "alpha_res_attn_ratio")
    least_usual_rate = 0.02  # about 1 is usual (figure 1)
    source = "Blake et al., u-μP: The Unit-Scaled Maximal Update Parametrization, arXiv 2407.17465"

    alpha_attn: float = 1.0
    alpha_ffn_act: float = 1.0
    alpha_res: float = 1.0
    alpha_res_attn_ratio: float = 1.0
    alpha_out: float = 1.0
    alpha_tied: float = 4.0
    eta_emb: float = 1.0
    eta_out: float = 1.0
    base_depth: float = 4.0
    depth_exponent: float = 1.0
    attn_exponent: float = 0.5
    readout_exponent: float = 0.5

    def weight(self, weight: Weight) -> list[Factor]:
        """The first column of the table above."""
        if weight.role == "hidden":
            return [_power("fan_in", weight.fan_in, -0.5, TABLE)]
        if weight.role == "readout" and weight.is_tied:
            tied = Factor(self.alpha_tied, "alpha_tied, of a readout that is the embedding too", MEASURED)
            return [_power("fan_in", weight.fan_in, -1.0, TABLE), tied, *self.hyperparameter("alpha_out")]
        if weight.role == "readout":
            source = TABLE if self.readout_exponent == 1.0 else MEASURED
            rule = _power("fan_in", weight.fan_in, -self.readout_exponent, source)
            return [rule, *self.hyperparameter("alpha_out")]
        return []

    def rates(self, weight: Weight) -> Rates:
        """The second column of the table above; for SGD as in the last paragraph."""
        width = _power("width", weight.width, self.readout_exponent, SGD)
        if weight.role == "hidden":
            depth = self._of_depth(weight.depth, self.depth_exponent - 1) if weight.depth != 1.0 else []
            sgd = _power("fan_in", weight.fan_in, self.readout_exponent, SGD)
            return Rates([_power("fan_in", weight.fan_in, -0.5, TABLE), *depth], [sgd], depth)
        if weight.role == "readout":
            p, ratio = self.readout_exponent, self.hyperparameter("eta_out")
            adam = _power("fan_in", weight.fan_in, p - 1, TABLE if p == 1.0 else MEASURED)
            return Rates([adam, *ratio], [_power("fan_in", weight.fan_in, 2 * p - 1, SGD)])
        if weight.is_table:
            ratio = self.hyperparameter("eta_emb")
            return Rates([_power("d_model", weight.width, -0.5, TABLE), *ratio], [width, *ratio], standard=ratio)
        larger = max(weight.fan_in, weight.width)
        return Rates([_power("width", larger, -1.0, MEASURED)], [width])

    def branch(self, branch: ResidualBranch) -> list[Factor]:
        """α/L^p before the addition; behind it a norm, τ."""
        alpha = self.alpha_of(branch.kind)
        cause = f"α of {branch.kind} branches: alpha_res = {self.alpha_res:g}, ratio = {self.alpha_res_attn_ratio:g}"
        factors = [Factor(alpha, cause, RESIDUAL)] if alpha != 1.0 else []
        before = sum(earlier.scheme.alpha_of(earlier.kind) ** 2 for earlier in branch.before)
        depth = self._of_depth(branch.depth, -self.depth_exponent)
        if not branch.post_norm:
            return [*factors, *depth]
        share = prod(factor.value for factor in depth)
        cause = f"1/√(1/m² + Σα²), m = {share:.3g} by depth, {len(branch.before)} branches before, a norm behind"
        return [*factors, Factor((share**-2 + before) ** -0.5, cause, RESIDUAL)]

    def _of_depth(self, depth: float, power: float) -> list[Factor]:
        """Of a stream with L pairs of branches: L^-½, and from `base_depth` on L^power."""
        shallow, deep = min(depth, self.base_depth), max(1.0, depth / self.base_depth)
        beyond = [_power("(L / base_depth)", deep, power, COMPLETEP)] if deep > 1.0 else []
        return [_power("L", shallow, -0.5, TABLE), *beyond]

    def alpha_of(self, kind: str) -> float:
        """α of the branches of a kind, "attention" or "mlp"."""
        alpha = self.alpha_res * sqrt(2 / (1 + self.alpha_res_attn_ratio**2))
        return self.alpha_res_attn_ratio * alpha if kind == "attention" else alpha

    def sum(self, terms: int) -> list[Factor]:
        """1/√n."""
        return [Factor(terms**-0.5, f"1/√n, a sum of {terms} independent tensors", "Unit Scaling, arXiv 2303.11257")]

    def attention(self, head_dim: int) -> list[Factor]:
        """α / d_head^p."""
        source = TABLE if self.attn_exponent == 1.0 else MEASURED
        return [_power("d_head", head_dim, -self.attn_exponent, source), *self.hyperparameter("alpha_attn")]

    def activation_input(self) -> list[Factor]:
        """α."""
        return self.hyperparameter("alpha_ffn_act")

    def activation(self, rms: float) -> list[Factor]:
        """1/RMS."""
        return [Factor(1 / rms, f"1 / RMS {rms:.4g} of the function of normal input", "Unit Scaling, arXiv 2303.11257")]


def _power(name: str, size: float, exponent: float, source: str) -> Factor:
    return Factor(size**exponent, f"{name}^{_written(exponent)}, {name} = {size:g}", source)


def _written(exponent: float) -> str:
    return {0.5: "½", -0.5: "-½"}.get(exponent, f"{exponent:g}")
