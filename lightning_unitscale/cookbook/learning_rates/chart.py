"""The plot of a sweep of learning rates: held-out loss by learning rate, a colour for each value of the axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no display, no global state
from omegaconf import DictConfig

from lightning_unitscale.cookbook.learning_rates.findings import GRIDS, best_of, losses_of
from lightning_unitscale.cookbook.learning_rates.grid import RateRun, is_power_of_two
from lightning_unitscale.cookbook.sweeps.results import Result

TITLES = dict(
    zip(
        GRIDS,
        ("Untouched, initial std 0.02", "Untouched, fan-in initialisation", 'UnitScaling(lr_units="umup")'),
        strict=True,
    )
)
Losses = Mapping[float, Sequence[float]]  # of the seeds, by learning rate


def transfer_chart(cfg: DictConfig, results: Sequence[Result[RateRun]]) -> Figure:
    """Each parametrization that was run beside the others; bands go from the best to the worst seed."""
    run = [name for name in GRIDS if any(losses_of(results, name, value) for value in cfg.sweep.points)] or GRIDS
    figure = Figure(figsize=(4 * (len(run) + bool(cfg.sweep.drop_in.points)), 4.2), layout="constrained")
    panels = figure.subplots(1, len(run) + bool(cfg.sweep.drop_in.points), squeeze=False)[0]
    shown = sorted({*cfg.sweep.points, *cfg.sweep.drop_in.points})
    colours = {value: f"C{number}" for number, value in enumerate(shown)}
    for axes, name in zip(panels, run, strict=False):
        _draw_grid(axes, cfg, results, name, colours)
        axes.set_title(TITLES[name])
    panels[0].set_ylabel("held-out loss, nats per byte")
    if cfg.sweep.drop_in.points:
        _draw_drop_in(panels[-1], cfg, results, colours)
        panels[-1].set_title('UnitScaling(lr_units="standard")')
    for axes in panels:
        axes.set_xlabel("learning rate")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return figure


def _draw_grid(
    axes: Axes, cfg: DictConfig, results: Sequence[Result[RateRun]], name: str, colours: Mapping[int, str]
) -> None:
    """The powers of two of one parametrization, in the same frame for each."""
    axis, values = cfg.sweep.axis, cfg.sweep.points
    for value in values:
        losses = {rate: all_ for rate, all_ in losses_of(results, name, value).items() if is_power_of_two(rate)}
        _draw_line(axes, losses, f"{axis} {value}", color=colours[value])
    axes.set_xscale("log", base=2)
    bests = [best.loss for value in values for name in GRIDS if (best := best_of(results, name, value))]
    if bests and math.isfinite(max(bests)):  # diverged runs leave the frame
        axes.set_ylim(min(bests) - 0.05, max(bests) + 0.6)


def _draw_drop_in(axes: Axes, cfg: DictConfig, results: Sequence[Result[RateRun]], colours: Mapping[int, str]) -> None:
    """The untouched model dashed, the scaled one at the same learning rates."""
    kept = list(cfg.sweep.drop_in.learning_rates)
    axis = cfg.sweep.axis
    for value in cfg.sweep.drop_in.points:
        plain = {rate: all_ for rate, all_ in losses_of(results, "standard", value).items() if rate in kept}
        _draw_line(axes, plain, f"{axis} {value}, untouched", color=colours[value], linestyle="--")
        _draw_line(axes, losses_of(results, "drop-in", value), f"{axis} {value}", color=colours[value])
    axes.set_xscale("log")
    axes.set_xticks(kept, [f"{rate:g}" for rate in kept])
    axes.minorticks_off()


def _draw_line(axes: Axes, losses: Losses, label: str, **style: Any) -> None:
    """One line with its band."""
    if not losses:
        return
    axes.plot(list(losses), [fmean(all_) for all_ in losses.values()], marker="o", label=label, **style)
    low, high = ([end(all_) for all_ in losses.values()] for end in (min, max))
    axes.fill_between(list(losses), low, high, color=style["color"], alpha=0.2)
