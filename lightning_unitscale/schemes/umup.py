"""u-μP: the Unit-Scaled Maximal Update Parametrization (Blake et al., arXiv 2407.17465), with readouts as drawn.

Weights have RMS 1 and explicit multipliers (Table 2 of the paper, but for what is marked *); V is a number of classes:

    hidden weight    W · fan_in^-½              learning rate η · fan_in^-½, × L^-½ inside residual branches
    readout: logits  W · α_out s fan_in^-½ *    η · η_out ln V · fan_in^-½ / s *    s = min(1, 0.45 ln V)
      … tied         W · α_out α_tied ln V / fan_in *     the embedding's
      … odds         W · α_out / fan_in         η · η_odds *
      … others       W · α_out / fan_in         η · η_target *
    embedding        W                          η · η_emb · d_model^-½
    bias, norm gain  1                          η / width *
    attention        softmax(α_attn q·k/√d_head) *, in place of the model's own factor
    activation f     f(α x) / √E[f(α z)²]       z ~ N(0, 1), α = α_ffn_act

Residual streams with L pairs of branches (L = half their number). Pre-norm: each branch × α · L^-½, the addition left
alone, which is the paper's τ rule with its common denominators multiplied out (appendix G.2.2). Post-norm: branch i ×
τ_i = α/√(L + Σα²), the sum over the branches before it; the norm does the dividing.

    α_mlp = r·√(2/(1+ρ²)),  α_attn = ρ·α_mlp,   r = α_res,  ρ = α_res_attn_ratio

Beyond B = base_depth = 4 pairs the rule is CompleteP's (arXiv 2505.01618) *: L^-½ is B^-½ · (L/B)^-p for branches,
B^-½ · (L/B)^(p-1) for rates, p = depth_exponent = 1. With ½ a sum of independent branches keeps RMS 1, with 1 one of
branches that are all alike, as training makes those of deep models. The αs are the paper's hyperparameters (its table
3), 1 unless set; none changes with size. α_out is its α_loss-softmax.

What differs from the paper, which exponents of attn 1, readout 1 and depth ½, and η_out = η_odds = η_target = 1 have:

Readouts. Logits are outputs that a softmax takes, by linear calls, additions and soft caps. In the paper their weight
is W/fan_in with the rate η: it begins √fan_in smaller than one drawn by fan-in, and the first part of a short run goes
by while it grows. Here it begins as large (s: a few classes have a loss that RMS 1 would raise by much of it), and a
step changes a logit by η η_out ln V at every width: how far the logits of V classes must come apart. What hidden
weights change through its initial values does grow, as √fan_in, so the paper's rule is the one of infinite width.
Outputs that are regressed to (squares, energies) start small, as in the paper: they would begin with an error. So do
those that a sigmoid takes, or a softmax of two; these must come far from 0 to be sure, so a step is the larger.

A readout that is the embedding too has the embedding's step. A token's row says of itself a logit of α_tied ln V times
the embedding's share of the stream: with α_tied = 1.5 the loss begins little above that of guessing.

Attention. 1/d_head is for queries and keys that have become alike; they begin independent, with logits of d_head^-½,
uniform weights, and take long to leave them. At 1/√d_head the model's own constant is kept, so nothing stands in the
forward pass of a model whose queries and keys come out of one weight.

Gains and biases. The paper's models have none. At η = 1 an Adam step would change a gain of 1 by 1; here it has the
rate that a hidden weight of its width has in folded storage.

With lr_units="standard" a learning rate `lr` gives each hidden weight the relative step that it had in the untouched
model: η = (lr / its initial RMS) · √(fan_in · L). The readout has the step of the table at the geometric mean of these
η. A matrix that starts at zero has the user's own step. What a step of these rates does to the loss of the first batch
is then limited: see `schemes.step_limits`. No optimizer's rate is taken for more than η_most = ½ (`optim.largest_eta`):
on nearly all kinds of models the best η is ¼ to 1, and at ½ they are close to their best (measured, see results.md).

The model's own constants (1/√d on logits, √d on embeddings, fixed residual multipliers) are absorbed: the rules above
give the total. Under SGD, learning rates are fan_in (hidden) and width (others), the gradient's own scale taken out
(μP, Yang & Hu, arXiv 2203.03466, Table 8); where all readouts make logits as drawn, whose gradients are √fan_in
larger, these to the power of readout_exponent.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, prod, sqrt

from lightning_unitscale.engine.plan.factors import Factor, inverse
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
        alpha_tied: the same where the readout is the embedding too, of V tokens: a token's own logit beside ln V.
        eta_emb: learning rate of embeddings beside that of the table.
        eta_out: the same of readouts that make logits of V classes for a softmax, beside ln V.
        eta_odds: the same of readouts whose outputs a sigmoid takes, or a softmax of two.
        eta_target: the same of all others.
        base_depth: pairs of branches up to which branches and their rates have L^-½, as in the paper.
        depth_exponent: p of what deeper ones have beyond: branches (L / base_depth)^-p, rates ^(p-1); the paper has ½.
        attn_exponent: p of the factor d_head^-p on attention logits; the paper's is 1.
        readout_exponent: p of the multiplier fan_in^-p of readouts that make logits; the paper's is 1.
        eta_most: with lr_units="standard", the largest η that an optimizer's rate may be.
    """

    name = "umup"
    of_weights = (
        *("alpha_out", "alpha_tied", "eta_emb", "eta_out", "eta_odds", "eta_target"),
        *("readout_exponent", "eta_most"),
    )
    of_the_whole = ("eta_most",)
    of_activations = ("alpha_attn", "attn_exponent", "alpha_ffn_act", "alpha_res", "alpha_res_attn_ratio")
    least_usual_rate = 0.02  # about 1 is usual (figure 1)
    source = "Blake et al., u-μP: The Unit-Scaled Maximal Update Parametrization, arXiv 2407.17465"

    alpha_attn: float = 1.0
    alpha_ffn_act: float = 1.0
    alpha_res: float = 1.0
    alpha_res_attn_ratio: float = 1.0
    alpha_out: float = 1.0
    alpha_tied: float = 1.5
    eta_emb: float = 1.0
    eta_out: float = 0.6
    eta_odds: float = 8.0
    eta_target: float = 4.0
    base_depth: float = 4.0
    depth_exponent: float = 1.0
    attn_exponent: float = 0.5
    readout_exponent: float = 0.5
    eta_most: float = 0.5

    def weight(self, weight: Weight) -> list[Factor]:
        """The first column of the table above."""
        if weight.role == "hidden":
            return [_power("fan_in", weight.fan_in, -0.5, TABLE)]
        if weight.role == "readout":
            p, source = self._readout(weight)
            few = [_few_classes(weight)] if p != 1.0 else []
            tied = self._tied(weight) if weight.is_tied else []
            return [_power("fan_in", weight.fan_in, -p, source), *few, *tied, *self.hyperparameter("alpha_out")]
        return []

    def rates(self, weight: Weight) -> Rates:
        """The second column of the table above; for SGD as in the last paragraph."""
        p, source = self._readout(weight)
        width = _power("width", weight.width, p, SGD)
        if weight.role == "hidden":
            depth = self._of_depth(weight.depth, self.depth_exponent - 1) if weight.depth != 1.0 else []
            sgd = [_power("fan_in", weight.fan_in, p, SGD)]
            return Rates([_power("fan_in", weight.fan_in, -0.5, TABLE), *depth], sgd, depth)
        if weight.role == "readout":
            sgd = [_power("fan_in", weight.fan_in, 2 * p - 1, SGD)]
            if weight.outputs != "logits":
                return Rates([self._no_logits(weight)], sgd)
            adam = [Factor(self.eta_out, "eta_out, of logits", MEASURED)]
            if p != 1.0:
                few = inverse(_few_classes(weight).value, "its multiplier for so few classes", MEASURED)
                adam += [_power("fan_in", weight.fan_in, p - 1, source), _range(weight), *few]
            return Rates(adam, sgd)
        if weight.is_table:
            ratios = self.hyperparameter("eta_emb")
            return Rates([_power("d_model", weight.width, -0.5, TABLE), *ratios], [width, *ratios], standard=ratios)
        larger = max(weight.fan_in, weight.width)
        return Rates([_power("width", larger, -1.0, MEASURED)], [width])

    def _tied(self, weight: Weight) -> list[Factor]:
        """α_tied · ln V on logits over V tokens; its step is the embedding's."""
        if weight.outputs != "logits":
            return [self._no_logits(weight)]
        return [_range(weight), Factor(self.alpha_tied, "alpha_tied, of a readout that is the embedding too", MEASURED)]

    def _no_logits(self, weight: Weight) -> Factor:
        """η_odds or η_target."""
        if weight.outputs == "odds":
            return Factor(self.eta_odds, "eta_odds, of outputs that a sigmoid takes, or a softmax of two", MEASURED)
        return Factor(self.eta_target, "eta_target, of outputs that neither softmax nor sigmoid takes", MEASURED)

    def _readout(self, weight: Weight) -> tuple[float, str]:
        """p of the readout's fan_in^-p, and its source."""
        if weight.outputs == "logits" and not weight.is_tied and self.readout_exponent != 1.0:
            return self.readout_exponent, MEASURED
        return 1.0, TABLE

    def most_useful_rate(self) -> float:
        """η_most."""
        return self.eta_most

    def begins_smaller(self) -> dict[str, float]:
        """The paper's readouts, √fan_in smaller: where the stream before them grows (dropout on it), RMS 1 is not 1."""
        return {} if self.readout_exponent == 1.0 else {"readout_exponent": 1.0}

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


def _range(weight: Weight) -> Factor:
    """How far the logits of V classes must come apart to be sure of one."""
    classes = weight.elements // weight.fan_in
    return Factor(log(classes), f"ln V, V = {classes}", MEASURED)


def _few_classes(weight: Weight) -> Factor:
    """What logits begin at, beside RMS 1: few classes have a small loss, which RMS 1 would raise by much of it."""
    apart = _range(weight)
    return Factor(min(1.0, 0.45 * apart.value), f"at most 0.45 {apart.cause}", MEASURED)


def _power(name: str, size: float, exponent: float, source: str) -> Factor:
    return Factor(size**exponent, f"{name}^{_written(exponent)}, {name} = {size:g}", source)


def _written(exponent: float) -> str:
    return {0.5: "½", -0.5: "-½"}.get(exponent, f"{exponent:g}")
