"""The figures of a report: exponents of operands beside the ranges of formats, drift over training, loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log2
from statistics import median

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no display, no global state

from lightning_unitscale.formats import FORMATS, OPERANDS, Numbers, Range, range_of
from lightning_unitscale.monitor.snapshot import Measurement, Snapshot

Curve = Sequence[tuple[int, float]]  # (step, value)

HEADINGS = {"x": "Activations", "weight": "Weights", "gradient": "Gradients"}
RULER = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
COLOURS = ("#9a9a9a", "#e08214", "#2166ac", "#1b7837")
MOST_SITES = 150  # wider pictures can't be read


def exponent_chart(snapshots: Sequence[Snapshot]) -> Figure:
    """Where the magnitudes of every site's operands lie as they are cast, beside what the formats can hold.

    A bar reaches from the exponent below which 1 % of the elements lie to that of the largest one, times the site's
    operand scale where it has one; the dot is the RMS.

    Args:
        snapshots: at least one; each becomes a colour.
    """
    sites = list(dict.fromkeys(m.site for snapshot in snapshots for m in snapshot.measurements))[:MOST_SITES]
    figure = Figure(figsize=(max(9.0, 3 + 0.07 * len(sites) * (len(snapshots) + 1)), 11), layout="constrained")
    rows = figure.subplots(len(OPERANDS), 2, sharex="col", width_ratios=(max(6.0, len(sites) / 6), 1), squeeze=False)
    for (axes, ruler), operand in zip(rows, OPERANDS, strict=True):
        for number, snapshot in enumerate(snapshots):
            label = f"{snapshot.label}, step {snapshot.step}"
            _draw_operands(axes, snapshot.of(operand), sites, number, len(snapshots), label)
        axes.set_title(HEADINGS[operand], loc="left")
        axes.set_ylabel("power of two")
        axes.set_xlim(-0.7, len(sites) - 0.3)
        _draw_range(axes, FORMATS[snapshots[0].format].numbers(operand))
        _draw_ruler(ruler, axes)
    rows[0, 0].figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=len(snapshots))
    rows[-1, 0].set_xticks(range(len(sites)), short_names(sites), rotation=90, fontsize=7)
    return figure


def _draw_operands(
    axes: Axes, measurements: Sequence[Measurement], sites: Sequence[str], number: int, of: int, label: str
) -> None:
    position = {site: i + 0.7 * ((number + 0.5) / of - 0.5) for i, site in enumerate(sites)}
    shown = [m for m in measurements if m.site in position and m.unscaled.rms > 0]
    shifts = [log2(m.scale or 1.0) for m in shown]
    at = [position[m.site] for m in shown]
    low = [(m.exponents.quantile(0.01) or 0) + shift for m, shift in zip(shown, shifts, strict=True)]
    high = [log2(m.unscaled.largest) + shift for m, shift in zip(shown, shifts, strict=True)]
    colour = COLOURS[number % len(COLOURS)]
    axes.vlines(at, low, high, color=colour, linewidth=2.5, alpha=0.75)
    rms = [log2(m.unscaled.rms) + shift for m, shift in zip(shown, shifts, strict=True)]
    axes.plot(at, rms, "o", color=colour, markersize=4, label=label)


def _draw_range(axes: Axes, numbers: Numbers) -> None:
    """Shades what the format flushes to zero or saturates, and lightly what it holds with less than full precision."""
    low, normal, high = _exponents(range_of(numbers))
    bottom, top = axes.get_ylim()
    bottom, top = min(bottom, low - 2), max(top, high + 2)
    axes.axhspan(bottom, low, color="#d73027", alpha=0.18, linewidth=0)
    axes.axhspan(low, normal, color="#d73027", alpha=0.07, linewidth=0)
    axes.axhspan(high, top, color="#d73027", alpha=0.18, linewidth=0)
    axes.axhline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom, top)
    axes.grid(axis="y", alpha=0.3)


def _draw_ruler(axes: Axes, beside: Axes) -> None:
    """One bar for each format: full precision dark, subnormal numbers light."""
    for position, dtype in enumerate(RULER.values()):
        low, normal, high = _exponents(range_of(dtype))
        axes.bar(position, high - normal, bottom=normal, color="#555555", width=0.7)
        axes.bar(position, normal - low, bottom=low, color="#c8c8c8", width=0.7)
    axes.set_ylim(beside.get_ylim())
    axes.set_xticks(range(len(RULER)), list(RULER), rotation=90, fontsize=7)
    axes.tick_params(labelleft=False, bottom=False, labelbottom=False, labeltop=True)


def _exponents(range: Range) -> tuple[float, float, float]:
    """Smallest number, smallest with full precision, largest; as powers of two."""
    return log2(range.subnormal), log2(range.normal), log2(range.largest)


def drift_chart(snapshots: Sequence[Snapshot]) -> Figure:
    """RMS of every site's operands over training: a thin line for each site, a thick one for their median.

    Args:
        snapshots: of one model, in the order of their steps.
    """
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, operand in zip(figure.subplots(1, len(OPERANDS)), OPERANDS, strict=True):
        curves: dict[str, list[tuple[int, float]]] = {}
        for snapshot in snapshots:
            for m in snapshot.of(operand):
                if m.unscaled.rms > 0:
                    curves.setdefault(m.site, []).append((snapshot.step, m.unscaled.rms))
        for curve in curves.values():
            axes.plot(*zip(*curve, strict=True), color="#2166ac", linewidth=0.8, alpha=0.35)
        steps = sorted({step for curve in curves.values() for step, _ in curve})
        middle = [median(rms for curve in curves.values() for at, rms in curve if at == step) for step in steps]
        axes.plot(steps, middle, color="black", linewidth=2, label="median of all sites")
        axes.set_yscale("log", base=2)
        axes.set_title(HEADINGS[operand], loc="left")
        axes.set(xlabel="step", ylabel="RMS")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    return figure


def loss_chart(curves: Mapping[str, Curve]) -> Figure:
    """Training and held-out loss by step.

    Args:
        curves: by the column of the log; "train/loss" and "val/loss" are drawn.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for column, label, style in (("train/loss", "training", "-"), ("val/loss", "held out", "o-")):
        if column in curves:
            axes.plot(*zip(*curves[column], strict=True), style, label=label)
    axes.set(xlabel="step", ylabel="loss")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    return figure


def short_names(sites: Sequence[str]) -> list[str]:
    """Without the attributes around the whole model, which say nothing, and without the function where it is linear."""
    names = [site.removesuffix(":linear") for site in sites]
    while names and "." in names[0] and all(name.startswith(names[0].partition(".")[0] + ".") for name in names):
        names = [name.partition(".")[2] for name in names]
    return names
