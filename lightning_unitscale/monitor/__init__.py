"""Instruments that show the numbers; they work on any module, scaled or not."""

from lightning_unitscale.monitor.rms import LayerRMS, measure_rms

__all__ = ["LayerRMS", "measure_rms"]
