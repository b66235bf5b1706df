"""`amax`: tensors divided by their largest magnitude, the rule of the article that this project began with.

    weights        θ_scaled = θ / α         α = max|θ| / √d
    activations    f_scaled = f(x) / β      β = max|f(x)| / √n
    gradients      the step uses g / γ      γ = max|g| / √d

d is the number of elements of the parameter: the article's θ = [w₁, w₂] has d = 2, and θ = [3, 4] has α = 4/√2. θ is
any parameter with a rule: matmul weights, tables, and gains and biases too. f is an elementwise function whose output
goes into matmuls with a parameter, and n the size of its feature dimension: the last one, or channels after a
convolution. A tensor that is all zero has α = 0 and is left alone.

`keep_function=True`, the default: α and β are carried along. F = α · (θ/α) is the model's own function; β is measured
once, on the recorded step, and the next weight is multiplied by it. In "unit" storage θ/α is what is stored and every
constant is explicit; in "folded" storage the weights are as they were. A pretrained model keeps what it knows.

`keep_function=False`: the function changes, as the article means it, to that of θ/α and f/β. β then is that of each
call's own output: max|f(x)| over the features at each position, so that neither the rest of the batch nor the length of
a sequence matters, and gradients pass through the maximum as through the rest. The factor stays in the forward pass,
and `remove_unit_scaling` refuses it. A matrix of d elements drawn from a normal distribution has max|θ| of about
√(2 ln d) standard deviations, so θ/α has an RMS of about √(d / (2 ln d)): 16 for 64 × 64, and growing with width.

What it does to training. A constant divisor of a gradient does nothing under Adam; γ is another one in every step, so
that large gradients weigh no more than small ones in its averages. Under SGD the step becomes a normalised one: the
largest element of U = θ/α, which starts at √d, moves by η · √d (times what momentum adds), at any loss scale and
clipping. A learning rate is then the share of its largest weight by which a parameter moves in one step, whatever
`lr_units` says; 0.01 is a start, with a schedule that ends near 0. `.grad` stays the true gradient, but while the
optimizer computes its update; see `optim.seen_gradients`. Measured beside `umup`: blocks/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from lightning_unitscale.engine.plan.factors import Factor
from lightning_unitscale.schemes.registry import register
from lightning_unitscale.schemes.scheme import Rates, Scheme, Weight

ARTICLE = "the article's rule, see schemes/amax.py"


@register
@dataclass(frozen=True)
class AMax(Scheme):
    """Divides weights, activations and gradients by max|t| / √n.

    Attributes:
        keep_function: carry the divisors of weights and activations along.
    """

    keep_function: bool = True

    name = "amax"
    source = ARTICLE
    on_top = True
    divides_gradients = True
    of_the_whole = ("keep_function",)

    @property
    def keeps_function(self) -> bool:
        """As its hyperparameter has it."""
        return self.keep_function

    def initial(self, weight: Weight) -> list[Factor]:
        """1/α."""
        alpha = self._alpha(weight)
        return [Factor(1 / alpha.value, f"1/α, {alpha.cause}", ARTICLE)] if alpha.value else []

    def weight(self, weight: Weight) -> list[Factor]:
        """α, carried along; 1 where the function changes."""
        alpha = self._alpha(weight)
        return [alpha] if self.keep_function and alpha.value else []

    def rates(self, weight: Weight) -> Rates:
        """η."""
        return Rates()

    def seen_activation(self, largest: float, features: int) -> list[Factor]:
        """1/β."""
        if not largest:
            return []
        cause = f"1/β, β = max|f| / √n = {largest:.4g} / √{features}"
        return [Factor(sqrt(features) / largest, cause, ARTICLE)]

    @staticmethod
    def _alpha(weight: Weight) -> Factor:
        value = weight.largest / sqrt(weight.elements) if weight.elements else 0.0
        return Factor(value, f"α = max|θ| / √d = {weight.largest:.4g} / √{weight.elements}", ARTICLE)
