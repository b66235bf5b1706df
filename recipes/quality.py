"""Train small models of many kinds with and without unit scaling, each at many learning rates.

    unitscale quality                                       # = python recipes/quality.py; hours on one core
    unitscale quality quality.jobs=[llama,vit] quality.seeds=[1] processes=2
    unitscale quality compare=schemes quality.jobs=[llama,vit,resnet]  # all schemes beside the untouched model
    unitscale quality only_report=true                      # table and page of what is finished
    unitscale quality '+jobs.mine={_target_: my_package.MyJob, width: 64, depth: 2, steps: 100, batch_size: 16}'

Variants of each job of `conf/quality.yaml`, on the same data, steps and batches, scored on held-out data:

    standard    the model as its author initialised it
    fan-in      matrices drawn with std fan_in^-1/2, branch outputs smaller by sqrt(2 depth), embeddings with std 1
    umup        UnitScaling(lr_units="umup"), at learning rates in u-muP's units
    drop-in     UnitScaling(), at the learning rates of the untouched model
    <scheme>    as unitscale=<scheme> gives it; compare=schemes has all of them in place of drop-in

and two goals: umup at its best is not worse than the better of standard and fan-in at theirs; drop-in is not worse than
standard at any rate at which that trains. A second table has the processor time of a step. A finished run is one line
in `runs.jsonl`; runs that are there with the same settings are not run again. Where a best is at the edge of the grid,
the grid grows (`quality.beyond`). After a change of the package itself, delete that file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.learning_rates.grid import RateRun
from lightning_unitscale.cookbook.quality.findings import JobFindings, goals
from lightning_unitscale.cookbook.quality.grid import (
    check_jobs,
    chosen_jobs,
    configuration,
    measure_job,
    planned_runs,
    runs_beyond,
    runs_near,
)
from lightning_unitscale.cookbook.quality.page import write_quality_page
from lightning_unitscale.cookbook.quality.tables import cost_table, goals_table
from lightning_unitscale.cookbook.sweeps.results import Result
from lightning_unitscale.cookbook.sweeps.sweep import finish_runs
from lightning_unitscale.cookbook.tables import print_and_keep


@recipe("quality")
def main(cfg: DictConfig) -> None:
    """Runs what is not finished yet, then reports."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    check_jobs(cfg)
    runs = planned_runs(cfg)
    results = finish(cfg, runs, folder)
    for _ in range(cfg.quality.beyond):
        runs = list(dict.fromkeys((*runs, *runs_beyond(cfg, results))))
        results = finish(cfg, runs, folder)
    for _ in range(1 + cfg.quality.beyond):  # again where the mean of all seeds has led to a rate beyond
        if near := [run for run in runs_near(cfg, results) if run not in runs]:
            results = finish(cfg, runs := [*runs, *near], folder)
    report(cfg, results, len(runs), folder)


def finish(cfg: DictConfig, runs: Sequence[RateRun], folder: Path) -> list[Result[RateRun]]:
    """The results of all these runs that are finished, after doing those that were not."""
    return list(
        finish_runs(
            {run: configuration(cfg, run) for run in runs},
            folder / "runs.jsonl",
            measure=measure_job,
            threads=cfg.threads,
            processes=cfg.processes,
            only_report=cfg.only_report,
        ).values()
    )


def report(cfg: DictConfig, results: Sequence[Result[RateRun]], count: int, folder: Path) -> None:
    """Prints the table and the goals; saves them and the page."""
    variants = [str(name) for name in cfg.variants]
    findings = [JobFindings(job, results, cfg.quality.share) for job in chosen_jobs(cfg)]
    findings = [job for job in findings if job.own]
    sentences = [f"{'yes' if holds else 'NO '} {goal}" for holds, goal in goals(findings, cfg.quality.cells)]
    sentences += [f"{job.job} was refused: {reason}" for job in findings for reason in job.refusals]
    sentences += [f"{len(results)} of {count} runs are finished"] if len(results) < count else []
    tables = goals_table(findings, variants), cost_table(findings, variants)
    print_and_keep(folder / "quality.txt", *tables, *sentences, width=180)
    print(f"page: {write_quality_page(folder, findings, variants, sentences)}")


if __name__ == "__main__":
    main()
