"""Unit scaling for any unmodified LightningModule."""

from lightning_unitscale.engine.plan import Plan
from lightning_unitscale.options import UnitScalingError
from lightning_unitscale.unit_scale import remove_unit_scaling, unit_scale

__all__ = ["Plan", "UnitScalingError", "remove_unit_scaling", "unit_scale"]
