"""Instruments that show the numbers; they work on any module, scaled or not."""

from lightning_unitscale.monitor.measurement import Measurement, Record, measure
from lightning_unitscale.monitor.scale_monitor import ScaleMonitor

__all__ = ["Measurement", "Record", "ScaleMonitor", "measure"]
