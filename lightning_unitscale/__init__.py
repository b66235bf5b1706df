"""Unit scaling for any unmodified LightningModule.

>>> Trainer(callbacks=[UnitScaling()])  # or Trainer(strategy="unitscale")
"""

from lightning_unitscale.blocks import (
    ActivationScaling,
    GradientScaling,
    WeightScaling,
    scale_activation,
    scale_gradient,
    scale_weight,
)
from lightning_unitscale.callback import UnitScaling
from lightning_unitscale.checkpoint import load_checkpoint
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.loading import wrap_load_state_dict
from lightning_unitscale.monitor import ScaleMonitor
from lightning_unitscale.optim.scaled_step import scale_learning_rates
from lightning_unitscale.spawned import wrap_recovery
from lightning_unitscale.strategy import register_strategies
from lightning_unitscale.unit_scale import recalibrating, remove_unit_scaling, unit_scale

register_strategies()
wrap_load_state_dict()
wrap_recovery()

__all__ = [
    "ActivationScaling",
    "GradientScaling",
    "Plan",
    "ScaleMonitor",
    "UnitScaling",
    "UnitScalingError",
    "WeightScaling",
    "load_checkpoint",
    "recalibrating",
    "remove_unit_scaling",
    "scale_activation",
    "scale_gradient",
    "scale_learning_rates",
    "scale_weight",
    "unit_scale",
]
