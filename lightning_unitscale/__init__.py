"""Unit scaling for any unmodified LightningModule.

>>> Trainer(callbacks=[UnitScaling()])  # or Trainer(strategy="unitscale")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_unitscale.attachments import attach

if TYPE_CHECKING:
    from lightning_unitscale.callback import UnitScaling
    from lightning_unitscale.checkpoint import load_checkpoint
    from lightning_unitscale.engine.plan.plan import Plan
    from lightning_unitscale.errors import UnitScalingError
    from lightning_unitscale.monitor import ScaleMonitor
    from lightning_unitscale.optim.scaled_step import scale_learning_rates
    from lightning_unitscale.plain_torch import recalibrating, remove_unit_scaling, unit_scale

__all__ = [
    "Plan",
    "ScaleMonitor",
    "UnitScaling",
    "UnitScalingError",
    "load_checkpoint",
    "recalibrating",
    "remove_unit_scaling",
    "scale_learning_rates",
    "unit_scale",
]
_HOMES = {
    "Plan": "engine.plan.plan",
    "ScaleMonitor": "monitor",
    "UnitScaling": "callback",
    "UnitScalingError": "errors",
    "load_checkpoint": "checkpoint",
    "recalibrating": "plain_torch",
    "remove_unit_scaling": "plain_torch",
    "scale_learning_rates": "optim.scaled_step",
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
