"""Building blocks to scale tensors by hand, in any `nn.Module`; README.md has the article's examples."""

from lightning_unitscale.blocks.activation import ActivationScaling, scale_activation
from lightning_unitscale.blocks.gradient import GradientScaling, scale_gradient
from lightning_unitscale.blocks.weight import WeightScaling, scale_weight

__all__ = [
    "ActivationScaling",
    "GradientScaling",
    "WeightScaling",
    "scale_activation",
    "scale_gradient",
    "scale_weight",
]
