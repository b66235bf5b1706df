"""The two tables of a sweep of learning rates: the best of each value, and the untouched model's rates kept."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from omegaconf import DictConfig
from rich.table import Table

from lightning_unitscale.cookbook.learning_rates.findings import GRIDS, best_of, better_baseline, losses_of
from lightning_unitscale.cookbook.learning_rates.grid import RateRun, readable_rate
from lightning_unitscale.cookbook.sweeps.results import Result
from lightning_unitscale.cookbook.tables import new_table


def transfer_table(cfg: DictConfig, results: Sequence[Result[RateRun]]) -> Table:
    """The best of each parametrization at each value of the axis, and umup's gain on the better baseline."""
    title = "Best held-out loss, nats per byte"
    columns = [column for name in GRIDS for column in (name, "learning rate")] + ["gain", "seeds"]
    table = new_table(title, [cfg.sweep.axis], columns)
    for value in cfg.sweep.points:
        bests = {name: best_of(results, name, value) for name in GRIDS}
        cells = []
        for best in bests.values():
            rate = readable_rate(best.learning_rate) + (" *" if best.at_edge else "") if best else ""
            cells += [mean_and_spread(best.losses), rate] if best else ["", ""]
            if best and best.at_edge:
                table.caption = "* at the edge of the grid: the best may lie outside"
        ours, theirs = bests["umup"], better_baseline(results, value)
        gain = f"{theirs.loss - ours.loss:+.3f}" if ours and theirs else ""
        seeds = ", ".join(dict.fromkeys(str(len(best.losses)) for best in bests.values() if best))
        table.add_row(str(value), *cells, gain, seeds)
    return table


def drop_in_table(cfg: DictConfig, results: Sequence[Result[RateRun]]) -> Table:
    """The scaled model beside the untouched one at the same learning rates."""
    title, numbers = "The untouched model's learning rates kept", ("untouched", "drop-in", "gain")
    table = new_table(title, (cfg.sweep.axis, "learning rate"), numbers)
    for value in cfg.sweep.drop_in.points:
        plain, scaled = losses_of(results, "standard", value), losses_of(results, "drop-in", value)
        for rate in cfg.sweep.drop_in.learning_rates:
            if rate in plain and rate in scaled:
                gain = fmean(plain[rate]) - fmean(scaled[rate])
                losses = mean_and_spread(plain[rate]), mean_and_spread(scaled[rate])
                table.add_row(str(value), f"{rate:g}", *losses, f"{gain:+.3f}")
    return table


def mean_and_spread(losses: Sequence[float]) -> str:
    """Mean, and half the range over the seeds."""
    text = f"{fmean(losses):.3f}"
    return f"{text} ± {(max(losses) - min(losses)) / 2:.3f}" if len(losses) > 1 else text
