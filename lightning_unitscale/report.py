"""The page a run leaves behind: `report/index.html` with its plots, `metrics.json` and `plan.txt` beside it."""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # without pyplot: no display, no global state

from lightning_unitscale.monitor import LayerRMS

RMS_PANELS = {
    "weight": "Weights",
    "activation": "Activations",
    "activation_gradient": "Gradients of activations",
    "weight_gradient": "Gradients of weights",
}

PAGE = """\
<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
  img {{ max-width: 100% }} pre {{ overflow-x: auto; background: #f5f5f5; padding: 1rem }}
  td {{ padding-right: 2rem }} td + td {{ text-align: right; font-variant-numeric: tabular-nums }}
</style>
<h1>{title}</h1>
<table>{metrics}</table>
<h2>Loss</h2>
<img src="loss.png" alt="Training and held-out loss by step">
<h2>RMS by layer</h2>
<p>One batch, forward and backward. Gradients are those of the mean loss.</p>
<img src="rms.png" alt="RMS of weights, activations and gradients by layer">
<h2>Sample</h2>
{samples}
<h2>Plan</h2>
<pre>{plan}</pre>
</html>
"""


def write_report(
    folder: Path,
    *,
    title: str,
    metrics: Mapping[str, Any],
    log: Path,
    rms: Mapping[str, Sequence[LayerRMS]],
    samples: Sequence[str],
    plan: str,
) -> Path:
    """Writes everything into `folder` and returns the page.

    Args:
        folder: Created where missing.
        title: Heading of the page.
        metrics: Final numbers by name; also written as `metrics.json`.
        log: `metrics.csv` of Lightning's CSVLogger, for the loss curves.
        rms: Measurements by legend label, for instance "untouched" and "scaled".
        samples: Generated texts.
        plan: The plan's table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _loss_figure(_read_log(log)).savefig(folder / "loss.png", dpi=120)
    _rms_figure(rms).savefig(folder / "rms.png", dpi=120)
    (folder / "metrics.json").write_text(json.dumps(dict(metrics), indent=2) + "\n", encoding="utf-8")
    (folder / "plan.txt").write_text(plan + "\n", encoding="utf-8")
    page = PAGE.format(
        title=html.escape(title),
        metrics="".join(f"<tr><td>{html.escape(k)}<td>{_readable(v)}" for k, v in metrics.items()),
        samples="".join(f"<pre>{html.escape(sample)}</pre>" for sample in samples),
        plan=html.escape(plan),
    )
    (folder / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"


def _readable(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else html.escape(str(value))


Curve = list[tuple[int, float]]


def _read_log(log: Path) -> dict[str, Curve]:
    """Column -> (step, value) of every row that has one; nothing where CSV logging was off."""
    curves: dict[str, Curve] = {}
    if log.exists():
        with log.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for column, value in row.items():
                    if value and column not in ("step", "epoch"):
                        curves.setdefault(column, []).append((int(row["step"]), float(value)))
    return curves


def _loss_figure(curves: Mapping[str, Curve]) -> Figure:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for column, label, style in (("train/loss", "training", "-"), ("val/loss", "held out", "o-")):
        if column in curves:
            axes.plot(*zip(*curves[column], strict=True), style, label=label)
    axes.set(xlabel="step", ylabel="nats per byte")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    return figure


def _rms_figure(rms: Mapping[str, Sequence[LayerRMS]]) -> Figure:
    names = list(dict.fromkeys(row.layer for rows in rms.values() for row in rows))
    position = {name: number for number, name in enumerate(names)}
    outer = names[0].split(".")[0] + "." if names else ""
    if all(name.startswith(outer) for name in names):  # the attribute that holds the whole model says nothing
        names = [name.removeprefix(outer) for name in names]
    figure = Figure(figsize=(max(8.0, 0.22 * len(names)), 12), layout="constrained")
    panels = figure.subplots(len(RMS_PANELS), sharex=True)
    for axes, (field, heading) in zip(panels, RMS_PANELS.items(), strict=True):
        for label, rows in rms.items():
            points = [(position[row.layer], getattr(row, field)) for row in rows if getattr(row, field)]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1, label=label)
        axes.set_yscale("log", base=2)
        axes.set_title(heading, loc="left")
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(rms))
    panels[-1].set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    return figure
