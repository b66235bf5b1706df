"""CompleteP (Dey et al., NeurIPS 2025, arXiv 2505.01618): hyperparameters of a base shape at other widths and depths.

Table 1 of the paper, with m_N = fan_in / base_width of a weight and m_L = L / base_depth of a residual stream with L
pairs of branches (L = half their number); σ, η, ε and λ are the base shape's initial std, learning rate, Adam's eps
and weight decay. α = 1 is CompleteP, α = ½ depth-μP.

                                   forward       initial variance   Adam's rate            eps             decay
    embedding                      α_in · W      σ²                 η                      ε / m_N         λ
    weight in a branch             W             σ² / m_N           η m_L^(α-1) / m_N      ε m_L^-α / m_N  λ m_N
    bias, gain in a branch         W                                η m_L^(α-1)            ε m_L^-α / m_N  λ
    hidden weight outside of all   W             σ² / m_N           η / m_N                ε / m_N         λ m_N
    final norm's gain and bias     W                                η                      ε / m_N         λ
    readout                        W α_out / m_N σ²                 η                      ε / m_N         λ
    attention logits               1 / d_head
    residual addition              x + m_L^-α f(x)

Here F is a weight as the function sees it, U = F / (its std) at RMS 1, and the rates are those of U: a readout's F is
W / m_N, so for it σ · α_out / m_N and η / σ. lr · λ is η · λ · m_L^(α-1) for weights in branches, η · λ for all
others. So the model at base_width and base_depth is a standard one drawn with std σ, and with lr_units="umup" η is an
ordinary learning rate, the one that is best there. For embeddings, gains and biases m_N is their width's.

Not the paper's: m_N of a weight is taken from its own fan-in, so that an mlp's second matrix has a smaller std than its
first at every width (the ratios between widths are the paper's). Weight decay of gains and biases is the user's choice.
Checked against the authors' code, with eps for embeddings and the final norm: EleutherAI/nanoGPT-mup, branch completep.

The paper leaves σ, α_in and α_out to be found at the base shape; its code has 0.02, 1 and 1. With these an embedding
enters the stream fifty times smaller than what a norm hands on, as in the untouched model, which such a model then
learns no better than. Here σ = 1/√256 draws hidden weights by their fan-in, α_in = 1/σ brings embeddings to RMS 1, and
α_out keeps a readout that is the embedding too from starting with large logits. Measured (unitscale quality, one seed,
best of 2^-8 and 2^-7, σ / α_in / α_out), on the two jobs that the numbers were chosen on:

            0.02/1/1    0.02/10/1    0.02/50/1    1/16 / 16 / 1    1/16 / 16 / ½    1/16 / 16 / ¼    untouched    umup
    llama     2.647       2.413        2.283          2.233            2.269            2.344          2.688     2.289
    gpt2      2.871       2.808        2.888        too large          2.573            2.592          2.754     2.549

and on one that they were not (unitscale pretrain, width 256): 1.726 at 2^-8 → 1.392 at 4e-3. Others: schemes/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_unitscale.engine.plan.factors import Factor
from lightning_unitscale.schemes.registry import register
from lightning_unitscale.schemes.scheme import Rates, ResidualBranch, Scheme, Weight

TABLE = "CompleteP, arXiv 2505.01618, table 1"


@register
@dataclass(frozen=True)
class CompleteP(Scheme):
    """Hyperparameters of a base shape, carried over to other widths and depths.

    Attributes:
        base_width, base_depth: the shape, in features and in layers (pairs of branches).
        init_std: σ there.
        alpha: depth exponent.
        alpha_in, alpha_out: on the embedding and on the logits.
    """

    name = "completep"
    source = "Dey et al., Don't be lazy: CompleteP enables compute-efficient deep transformers, arXiv 2505.01618"
    families = ("adam", "muon")
    of_weights = ("base_width", "init_std", "alpha_in", "alpha_out")

    base_width: float = 256.0
    base_depth: float = 2.0
    init_std: float = 0.0625
    alpha: float = 1.0
    alpha_in: float = 16.0
    alpha_out: float = 0.5

    def weight(self, weight: Weight) -> list[Factor]:
        """The std of F."""
        std = Factor(self.init_std, "init_std", TABLE)
        if weight.role == "hidden":
            return [std, self._width(weight, -0.5)]
        if weight.role == "readout":
            return [std, self._width(weight, -1.0), *self.hyperparameter("alpha_out")]
        if weight.is_table:
            return [std, *self.hyperparameter("alpha_in")]
        return []

    def rates(self, weight: Weight) -> Rates:
        """Rate and eps of U, and what decay is multiplied by."""
        std = Factor(1 / self.init_std, "1 / init_std: a step of W, said of the weight at RMS 1", TABLE)
        depth = self._depth(weight, self.alpha - 1)
        eps = [self._width(weight, -1.0), *self._depth(weight, -self.alpha)]
        if weight.role == "hidden":
            own = [Factor(self.init_std, "init_std", TABLE), self._width(weight, -0.5)]
            return Rates([std, self._width(weight, -0.5), *depth], depth=depth, eps=[*own, *eps], decay=depth)
        if weight.role == "readout" or weight.is_table:
            return Rates([std], eps=[Factor(self.init_std, "init_std", TABLE), *eps])
        return Rates(depth, depth=depth, eps=eps)

    def branch(self, branch: ResidualBranch) -> list[Factor]:
        """m_L^-α."""
        cause = f"m_L^-{self.alpha:g}, m_L = {branch.depth:g} / {self.base_depth:g}"
        return [Factor((branch.depth / self.base_depth) ** -self.alpha, cause, TABLE)]

    def attention(self, head_dim: int) -> list[Factor]:
        """1/d_head."""
        return [Factor(1 / head_dim, f"1 / d_head, d_head = {head_dim}", TABLE)]

    def _width(self, weight: Weight, power: float) -> Factor:
        size = weight.fan_in if weight.role in ("hidden", "readout") else max(weight.fan_in, weight.width)
        return Factor((size / self.base_width) ** power, f"m_N^{power:g}, m_N = {size} / {self.base_width:g}", TABLE)

    def _depth(self, weight: Weight, power: float) -> list[Factor]:
        if not weight.in_branch or power == 0:
            return []
        cause = f"m_L^{power:g}, m_L = {weight.depth:g} / {self.base_depth:g}"
        return [Factor((weight.depth / self.base_depth) ** power, cause, TABLE)]
