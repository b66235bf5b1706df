"""The page that a run leaves behind; needs matplotlib (`pip install 'lightning-unitscale[recipes]'`)."""

from lightning_unitscale.monitor.page import render_report, write_report

__all__ = ["render_report", "write_report"]
