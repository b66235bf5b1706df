"""Instruments that show the numbers; they work on any module, scaled or not."""

from lightning_unitscale.monitor.probes import measure
from lightning_unitscale.monitor.scale_monitor import ScaleMonitor
from lightning_unitscale.monitor.snapshot import Measurement, Snapshot

__all__ = ["Measurement", "ScaleMonitor", "Snapshot", "measure"]
