"""Make the page of a run, or one page of several: outcome, curves, samples, what unit scaling did, numerics.

    unitscale report run=outputs/pretrain/2026-01-01_12-00-00    # = python recipes/report.py run=…
    unitscale report runs=[outputs/pretrain/a,outputs/pretrain/b] output=ab.html    # side by side

Works on any run's folder, finished or stopped, and on the log folder of your own Trainer with a `ScaleMonitor`.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from lightning_unitscale.cli import recipe
from lightning_unitscale.errors import InputError
from lightning_unitscale.monitor.comparison import compare_runs
from lightning_unitscale.monitor.report import render_report


@recipe("report")
def main(cfg: DictConfig) -> None:
    """Writes `<run>/report/index.html` and its PNGs, or the page of several runs."""
    if bool(cfg.run) == bool(cfg.runs):
        raise InputError("say which run, or which runs to compare: run=<folder>, or runs=[<folder>,<folder>]")
    page = render_report(Path(cfg.run)) if cfg.run else compare_runs([*map(Path, cfg.runs)], Path(cfg.output))
    print(f"report {page}")


if __name__ == "__main__":
    main()
