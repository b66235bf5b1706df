"""`preserve`: the model's own function and training, with everything seen and nothing changed.

All multipliers are 1, weights and learning rates are the model's own. It is what a pretrained model wants; what it
adds is the plan itself, on which low-precision formats rest.
"""

from __future__ import annotations

from lightning_unitscale.engine.plan.factors import Factor
from lightning_unitscale.schemes.registry import register
from lightning_unitscale.schemes.scheme import Rates, Scheme, Weight


@register
class Preserve(Scheme):
    """Changes nothing."""

    name = "preserve"
    changes_training = False

    def weight(self, weight: Weight) -> list[Factor]:
        """As it is."""
        return []

    def rates(self, weight: Weight) -> Rates:
        """The user's."""
        return Rates()
