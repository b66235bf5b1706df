"""Compare how learning rates carry over along an axis, with and without unit scaling.

    unitscale transfer                                      # = python recipes/transfer.py; widths; hours on one core
    unitscale transfer sweep=depth                          # or batch, steps, sequence: one varies, the rest stays
    unitscale transfer optimizer=adamw_independent          # with weight decay, the same at every learning rate
    unitscale transfer sweep=quick                          # seconds: does everything work here?
    unitscale transfer sweep.points=[64,128] sweep.seeds=[1]
    unitscale transfer sweep.axis=heads sweep.key=model.head_width sweep.points=[16,32,64]    # any other setting
    unitscale transfer only_report=true                     # table and plot of what is finished

Four parametrizations of one model, on the same text, steps and batches:

    standard    the untouched model, its weights drawn with std 0.02 at every width
    fan-in      the untouched model, its weights drawn with std fan_in^-1/2 (`model.initial=fan_in`)
    umup        UnitScaling(lr_units="umup"): learning rates in u-muP's units, to carry over to other sizes
    drop-in     UnitScaling(lr_units="standard"): the untouched model's learning rates, to keep its settings

Every run is the recipe `pretrain` with another size, learning rate and seed. A finished run is one line in
`runs.jsonl`; runs that are there with the same settings are not run again, so an interrupted sweep goes on where it
stopped. After a change of the package itself, delete that file. At the end: the tables, `transfer.png` and
`transfer.json` with all curves.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.learning_rates.chart import transfer_chart
from lightning_unitscale.cookbook.learning_rates.findings import findings
from lightning_unitscale.cookbook.learning_rates.grid import RateRun, configuration, planned_runs
from lightning_unitscale.cookbook.learning_rates.tables import drop_in_table, transfer_table
from lightning_unitscale.cookbook.runs import check
from lightning_unitscale.cookbook.sweeps.results import Result
from lightning_unitscale.cookbook.sweeps.sweep import finish_runs
from lightning_unitscale.cookbook.tables import print_and_keep
from lightning_unitscale.errors import InputError


@recipe("transfer")
def main(cfg: DictConfig) -> None:
    """Runs what is not finished yet, then reports."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    runs = planned_runs(cfg.sweep)
    check_sweep(cfg, runs)
    configurations = {run: configuration(cfg, run) for run in runs}
    results = finish_runs(
        configurations, folder / "runs.jsonl", threads=cfg.threads, processes=cfg.processes, only_report=cfg.only_report
    )
    report(cfg, list(results.values()), folder, len(runs))


def check_sweep(cfg: DictConfig, runs: Collection[RateRun]) -> None:
    """Raises InputError for a setting that any of the runs can't have."""
    if not cfg.unitscale or cfg.unitscale.scheme != "umup":
        raise InputError("the comparison needs unitscale=umup; it trains the untouched model anyway")
    if not runs:
        raise InputError("the sweep is empty: give sweep.points, sweep.seeds, and learning rates")
    if OmegaConf.select(cfg, cfg.sweep.key, throw_on_missing=False) is None:
        raise InputError(f"sweep.key={cfg.sweep.key}: there is no such setting; see unitscale pretrain --cfg job")
    if cfg.sweep.fan_in and "initial" not in cfg.model:
        raise InputError("this model has no setting `initial`, so no fan-in baseline; leave it out: sweep.fan_in=[]")
    for run in runs:
        check(configuration(cfg, run))


def report(cfg: DictConfig, results: Sequence[Result[RateRun]], folder: Path, count: int) -> None:
    """Prints the tables; saves them, the plot and all curves."""
    claims = list(findings(cfg, results))
    print_and_keep(
        folder / "transfer.txt",
        transfer_table(cfg, results),
        drop_in_table(cfg, results),
        *(f"{'yes' if holds else 'NO '} {claim}" for holds, claim in claims),
        *([f"{len(results)} of {count} runs are finished"] if len(results) < count else []),
    )
    transfer_chart(cfg, results).savefig(folder / "transfer.png", dpi=120)
    content = {
        "configuration": OmegaConf.to_container(cfg, resolve=True),
        "findings": [{"holds": holds, "claim": claim} for holds, claim in claims],
        "runs": [result.to_row() for result in results],
    }
    (folder / "transfer.json").write_text(json.dumps(content, indent=1))
    print(f"table, plot and curves: {folder}")


if __name__ == "__main__":
    main()
