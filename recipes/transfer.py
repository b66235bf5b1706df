"""Compare how learning rates carry over between widths, with and without unit scaling.

    unitscale transfer                                      # = python recipes/transfer.py; hours on one core
    unitscale transfer sweep=quick                          # seconds: does everything work here?
    unitscale transfer sweep.widths=[64,128] sweep.seeds=[1]
    unitscale transfer only_report=true                     # table and plot of what is finished

Three parametrizations of one model, on the same text, steps and batches:

    standard    the untouched model
    umup        UnitScaling(lr_units="umup"): learning rates in u-muP's units, to carry over to other widths
    drop-in     UnitScaling(lr_units="standard"): the untouched model's learning rates, to keep its settings

Every run is the recipe `pretrain` with another width, learning rate and seed. A finished run is one line in
`runs.jsonl`; runs that are there with the same settings are not run again, so an interrupted sweep goes on where it
stopped. After a change of the package itself, delete that file. At the end: the tables, `transfer.png` and
`transfer.json` with all curves.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.runs import check, train
from lightning_unitscale.errors import InputError

CURVE_STEPS = 10  # training steps averaged into one point of a curve
DROP_IN_TOLERANCE = 0.1  # nats

# ----------------------------------------------------------------------------------------------------------------------
# The runs


@dataclass(frozen=True)
class Run:
    """One training run of the sweep."""

    parametrization: str
    width: int
    learning_rate: float
    seed: int

    def __str__(self) -> str:
        rate = readable(self.learning_rate)
        return f"{self.parametrization:8} width {self.width:4}, learning rate {rate:>5}, seed {self.seed}"


@dataclass
class Result:
    """What a finished run leaves: one line of `runs.jsonl`.

    Attributes:
        settings: hash of everything that decides the result.
        held_out: loss in nats per byte after the last step; infinite where training diverged.
        curve: training loss, averaged over 10 steps.
    """

    run: Run
    settings: str
    held_out: float
    curve: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> str:
        """One line; infinity, which JSON doesn't know, as null."""
        return json.dumps({**asdict(self), "held_out": self.held_out if math.isfinite(self.held_out) else None})

    @classmethod
    def from_json(cls, line: str) -> Result:
        """The inverse of `to_json`."""
        data = json.loads(line)
        held_out = math.inf if data["held_out"] is None else data["held_out"]
        return cls(**{**data, "run": Run(**data["run"]), "held_out": held_out})


def planned(sweep: DictConfig) -> list[Run]:
    """All runs, one seed after the other, small widths first, so that an early stop leaves whole tables."""
    runs = []
    for seed in sweep.seeds:
        for width in sweep.widths:
            runs += [Run("standard", width, 2.0**k, seed) for k in sweep.standard]
            runs += [Run("umup", width, 2.0**k, seed) for k in sweep.umup]
        for width in sweep.drop_in.widths:
            for rate in sweep.drop_in.learning_rates:
                runs += [Run("standard", width, rate, seed), Run("drop-in", width, rate, seed)]
    return list(dict.fromkeys(runs))


def configuration(cfg: DictConfig, run: Run) -> DictConfig:
    """The settings of `unitscale pretrain` for one run."""
    cfg = cfg.copy()
    cfg.seed, cfg.model.width, cfg.optimizer.lr = run.seed, run.width, run.learning_rate
    cfg.trainer.val_check_interval = cfg.trainer.max_steps * cfg.trainer.accumulate_grad_batches
    if run.parametrization == "standard":
        cfg.unitscale = None
    elif run.parametrization == "drop-in":
        cfg.unitscale.lr_units = "standard"
    else:
        cfg.unitscale.lr_units = "umup"
    return cfg


def settings(cfg: DictConfig) -> str:
    """A hash of everything in the configuration that decides the result of a run."""
    names = ["seed", "model", "data", "task", "optimizer", "schedule", "unitscale", "trainer"]
    relevant = OmegaConf.masked_copy(cfg, names)
    relevant.trainer.default_root_dir = None
    text = json.dumps(OmegaConf.to_container(relevant, resolve=True), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Curve(pl.Callback):
    """Collects the training loss."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """Called after every step."""
        self.losses.append(float(outputs["loss"]))

    def points(self) -> list[float]:
        """Means over consecutive steps."""
        starts = range(0, len(self.losses), CURVE_STEPS)
        return [round(fmean(self.losses[start : start + CURVE_STEPS]), 4) for start in starts]


def measure(cfg: DictConfig) -> tuple[float, list[float]]:
    """Held-out loss and training curve of one run of the pretraining recipe."""
    curve = Curve()
    trainer = train(cfg, [curve])
    held_out = float(trainer.callback_metrics["val/loss"])
    return (held_out if math.isfinite(held_out) else math.inf), curve.points()


def many_runs(threads: int | None) -> None:
    """Set up a process that trains one model after another: with so many threads, and without Lightning's greetings."""
    if threads:
        torch.set_num_threads(threads)
    for name in ("pytorch_lightning", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers")


def finished(file: Path) -> dict[str, Result]:
    """The runs in the file, by the hash of their settings; a line cut short by an interrupt doesn't count."""
    results = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            result = Result.from_json(line)
        except json.JSONDecodeError:
            continue
        results[result.settings] = result
    return results


# ----------------------------------------------------------------------------------------------------------------------
# What they say


@dataclass(frozen=True)
class Best:
    """The best learning rate of one parametrization at one width, by the mean held-out loss of the seeds."""

    learning_rate: float
    losses: tuple[float, ...]
    at_edge: bool

    @property
    def loss(self) -> float:
        """The mean over the seeds."""
        return fmean(self.losses)


def losses_of(results: Sequence[Result], parametrization: str, width: int) -> dict[float, tuple[float, ...]]:
    """Held-out losses of all seeds, by learning rate."""
    losses: dict[float, tuple[float, ...]] = {}
    for result in sorted(results, key=lambda result: (result.run.learning_rate, result.run.seed)):
        if (result.run.parametrization, result.run.width) == (parametrization, width):
            rate = result.run.learning_rate
            losses[rate] = (*losses.get(rate, ()), result.held_out)
    return losses


def best_of(results: Sequence[Result], parametrization: str, width: int) -> Best | None:
    """The best on the grid of powers of two; learning rates with fewer seeds than others don't take part."""
    losses = {rate: all_ for rate, all_ in losses_of(results, parametrization, width).items() if is_power(rate)}
    if not losses:
        return None
    seeds = max(map(len, losses.values()))
    rate = min((rate for rate in losses if len(losses[rate]) == seeds), key=lambda rate: fmean(losses[rate]))
    return Best(rate, losses[rate], at_edge=rate in (min(losses), max(losses)))


def findings(cfg: DictConfig, results: Sequence[Result]) -> Iterator[tuple[bool, str]]:
    """(whether it holds, the claim with its numbers), for each claim that the results can decide."""
    widths = list(cfg.sweep.widths)
    ours = {width: best for width in widths if (best := best_of(results, "umup", width))}
    theirs = {width: best for width in widths if (best := best_of(results, "standard", width))}

    if both := [width for width in ours if width in theirs]:
        gains = {width: theirs[width].loss - ours[width].loss for width in both}
        text = ", ".join(f"{width}: {gain:+.3f}" for width, gain in gains.items())
        yield min(gains.values()) > 0, f"umup's best beats standard's best at every width (gain in nats {text})"
    if len(ours) > 1:
        for name, bests in (("umup", ours), ("standard", theirs)):
            exponents = [math.log2(best.learning_rate) for best in bests.values()]
            spread = max(exponents) - min(exponents) if exponents else 0.0
            yield spread <= 1, f"{name}'s best learning rate stays within a factor 2 over the widths (2^{spread:g})"
        losses = [ours[width].loss for width in sorted(ours)]
        steps = [after - before for before, after in pairwise(losses)]
        yield max(steps) <= 0, f"wider is not worse at umup's best learning rate (worst change {max(steps):+.3f} nats)"

    excesses = []
    for width in cfg.sweep.drop_in.widths:
        plain, scaled = losses_of(results, "standard", width), losses_of(results, "drop-in", width)
        excesses += [fmean(scaled[rate]) - fmean(plain[rate]) for rate in scaled if rate in plain]
    if excesses:
        claim = f"drop-in is never more than {DROP_IN_TOLERANCE} nats above the untouched model"
        yield max(excesses) <= DROP_IN_TOLERANCE, f"{claim} (worst {max(excesses):+.3f})"


def is_power(rate: float) -> bool:
    """Whether it lies on the factor-2 grid."""
    return math.log2(rate).is_integer()


def readable(rate: float) -> str:
    """A power of two as such."""
    return f"2^{math.log2(rate):.0f}" if is_power(rate) else f"{rate:g}"


def spread(losses: Sequence[float]) -> str:
    """Mean, and half the range over the seeds."""
    text = f"{fmean(losses):.3f}"
    return f"{text} ± {(max(losses) - min(losses)) / 2:.3f}" if len(losses) > 1 else text


# ----------------------------------------------------------------------------------------------------------------------
# Tables and plot


def transfer_table(cfg: DictConfig, results: Sequence[Result]) -> Table:
    """The best of each parametrization at each width."""
    table = Table(title=f"Best held-out loss, nats per byte, after {cfg.trainer.max_steps} steps")
    table.add_column("width")
    for name in ("standard", "learning rate", "umup", "learning rate", "gain", "seeds"):
        table.add_column(name, justify="right")
    edge = False
    for width in cfg.sweep.widths:
        bests = [best_of(results, name, width) for name in ("standard", "umup")]
        cells = []
        for best in bests:
            edge |= best is not None and best.at_edge
            rate = readable(best.learning_rate) + (" *" if best.at_edge else "") if best else ""
            cells += [spread(best.losses), rate] if best else ["", ""]
        theirs, ours = bests
        gain = f"{theirs.loss - ours.loss:+.3f}" if ours and theirs else ""
        seeds = ", ".join(dict.fromkeys(str(len(best.losses)) for best in bests if best))
        table.add_row(str(width), *cells, gain, seeds)
    if edge:
        table.caption = "* at the edge of the grid: the best may lie outside"
    return table


def drop_in_table(cfg: DictConfig, results: Sequence[Result]) -> Table:
    """The scaled model beside the untouched one at the same learning rates."""
    table = Table(title="The untouched model's learning rates kept")
    for name in ("width", "learning rate"):
        table.add_column(name)
    for name in ("untouched", "drop-in", "gain"):
        table.add_column(name, justify="right")
    for width in cfg.sweep.drop_in.widths:
        plain, scaled = losses_of(results, "standard", width), losses_of(results, "drop-in", width)
        for rate in cfg.sweep.drop_in.learning_rates:
            if rate in plain and rate in scaled:
                gain = fmean(plain[rate]) - fmean(scaled[rate])
                table.add_row(str(width), f"{rate:g}", spread(plain[rate]), spread(scaled[rate]), f"{gain:+.3f}")
    return table


def figure(cfg: DictConfig, results: Sequence[Result]) -> Figure:
    """Held-out loss by learning rate, a colour for each width; bands go from the best to the worst seed."""
    fig = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = fig.subplots(1, 3)
    widths, kept = cfg.sweep.widths, list(cfg.sweep.drop_in.learning_rates)
    colors = {width: f"C{number}" for number, width in enumerate(sorted({*widths, *cfg.sweep.drop_in.widths}))}
    for axis, name, title in (
        (left, "standard", "Standard parametrization"),
        (middle, "umup", 'UnitScaling(lr_units="umup")'),
    ):
        for width in widths:
            grid = {rate: all_ for rate, all_ in losses_of(results, name, width).items() if is_power(rate)}
            draw(axis, grid, f"width {width}", color=colors[width])
        axis.set_title(title)
        axis.set_xscale("log", base=2)
    for width in cfg.sweep.drop_in.widths:
        plain = {rate: all_ for rate, all_ in losses_of(results, "standard", width).items() if rate in kept}
        draw(right, plain, f"width {width}, untouched", color=colors[width], linestyle="--")
        draw(right, losses_of(results, "drop-in", width), f"width {width}", color=colors[width])
    right.set_title('UnitScaling(lr_units="standard")')
    right.set_xscale("log")
    right.set_xticks(kept, [f"{rate:g}" for rate in kept])
    right.minorticks_off()

    bests = [best.loss for width in widths for name in ("standard", "umup") if (best := best_of(results, name, width))]
    for axis in (left, middle):
        if bests and math.isfinite(max(bests)):  # diverged runs leave the frame
            axis.set_ylim(min(bests) - 0.05, max(bests) + 0.6)
    for axis in (left, middle, right):
        axis.set_xlabel("learning rate")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    left.set_ylabel("held-out loss, nats per byte")
    return fig


def draw(axis: Any, losses: dict[float, tuple[float, ...]], label: str, **style: Any) -> None:
    """One line with its band."""
    if not losses:
        return
    axis.plot(list(losses), [fmean(all_) for all_ in losses.values()], marker="o", label=label, **style)
    low, high = ([end(all_) for all_ in losses.values()] for end in (min, max))
    axis.fill_between(list(losses), low, high, color=style["color"], alpha=0.2)


# ----------------------------------------------------------------------------------------------------------------------
# The sweep


@recipe("transfer")
def main(cfg: DictConfig) -> None:
    """Runs what is not finished yet, then reports."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    runs = {run: configuration(cfg, run) for run in check_sweep(cfg)}
    many_runs(cfg.threads)
    file = folder / "runs.jsonl"
    keys = {run: settings(run_cfg) for run, run_cfg in runs.items()}
    known = finished(file)
    left = [] if cfg.only_report else [run for run, key in keys.items() if key not in known]
    for number, run in enumerate(left, start=1):
        begin = time.perf_counter()
        held_out, curve = measure(runs[run])
        result = Result(run, keys[run], held_out, curve, round(time.perf_counter() - begin, 1))
        with file.open("a") as stream:
            stream.write("\n" * ends_within_line(file) + result.to_json() + "\n")
        print(f"[{number}/{len(left)}] {run}: {held_out:.3f} ({result.seconds:.0f} s)", flush=True)

    known = finished(file)
    report(cfg, [known[key] for key in keys.values() if key in known], folder, len(runs))


def ends_within_line(file: Path) -> bool:
    """Whether a former sweep was stopped while it wrote."""
    return file.exists() and file.stat().st_size > 0 and not file.read_bytes().endswith(b"\n")


def check_sweep(cfg: DictConfig) -> list[Run]:
    """The planned runs; raises InputError for a setting that any of them can't have."""
    if not cfg.unitscale or cfg.unitscale.scheme != "umup":
        raise InputError("the comparison needs unitscale=umup; it trains the untouched model anyway")
    runs = planned(cfg.sweep)
    if not runs:
        raise InputError("the sweep is empty: give sweep.widths, sweep.seeds, and learning rates")
    for run in runs:
        check(configuration(cfg, run))
    return runs


def report(cfg: DictConfig, results: Sequence[Result], folder: Path, count: int) -> None:
    """Prints the tables; saves them, the plot and all curves."""
    claims = list(findings(cfg, results))
    with (folder / "transfer.txt").open("w") as stream:
        for console in (Console(), Console(file=stream, width=100)):
            console.print(transfer_table(cfg, results))
            console.print(drop_in_table(cfg, results))
            for holds, claim in claims:
                console.print(f"{'yes' if holds else 'NO '} {claim}", markup=False)
            if len(results) < count:
                console.print(f"{len(results)} of {count} runs are finished")
    figure(cfg, results).savefig(folder / "transfer.png", dpi=120)
    content = {
        "configuration": OmegaConf.to_container(cfg, resolve=True),
        "findings": [{"holds": holds, "claim": claim} for holds, claim in claims],
        "runs": [json.loads(result.to_json()) for result in results],
    }
    (folder / "transfer.json").write_text(json.dumps(content, indent=1))
    print(f"table, plot and curves: {folder}")


if __name__ == "__main__":
    main()
