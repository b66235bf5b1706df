"""Make the page of a run: operands and formats, worst sites, drift, loss, plan.

    unitscale report run=outputs/pretrain/2026-01-01_12-00-00    # = python recipes/report.py run=…

Works on any run's folder, finished or stopped, and on the log folder of your own Trainer with a `ScaleMonitor`.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from lightning_unitscale.cli import recipe
from lightning_unitscale.monitor.report import render_report


@recipe("report")
def main(cfg: DictConfig) -> None:
    """Writes `<run>/report/index.html` and its PNGs."""
    print(f"report {render_report(Path(cfg.run))}")


if __name__ == "__main__":
    main()
