"""Unit scaling for any unmodified LightningModule.

>>> Trainer(callbacks=[UnitScaling()])  # or Trainer(strategy="unitscale")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_unitscale.attachments import attach

if TYPE_CHECKING:
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
    from lightning_unitscale.monitor import ScaleMonitor
    from lightning_unitscale.non_finite_steps import NonFiniteSteps
    from lightning_unitscale.optim.scale_learning_rates import scale_learning_rates
    from lightning_unitscale.plain_torch import recalibrating, remove_unit_scaling, unit_scale

__all__ = [
    "ActivationScaling",
    "GradientScaling",
    "NonFiniteSteps",
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
_HOMES = {
    "ActivationScaling": "blocks",
    "GradientScaling": "blocks",
    "NonFiniteSteps": "non_finite_steps",
    "Plan": "engine.plan.plan",
    "ScaleMonitor": "monitor",
    "UnitScaling": "callback",
    "UnitScalingError": "errors",
    "load_checkpoint": "checkpoint",
    "recalibrating": "plain_torch",
    "remove_unit_scaling": "plain_torch",
    "WeightScaling": "blocks",
    "scale_activation": "blocks",
    "scale_gradient": "blocks",
    "scale_learning_rates": "optim.scale_learning_rates",
    "scale_weight": "blocks",
    "unit_scale": "plain_torch",
}

attach()


def __getattr__(name: str) -> Any:
    """Imports what is asked for, when it is (PEP 562): `unitscale --help` needs neither torch nor Lightning."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
