"""Train every task untouched and with unit scaling, each at its best learning rate, and write one table.

    unitscale tasks                                         # = python recipes/tasks.py; hours on one core
    unitscale tasks tasks=[dialogue,translation] seeds=[1]
    unitscale tasks "settings=['trainer.max_steps=100']" variants.standard.rates=[-10,-9] variants.umup.rates=[0,1]
    unitscale tasks tasks=[mine] --config-dir my_conf       # an experiment of your own
    unitscale tasks only_report=true                        # table and page of what is finished

A task is an experiment of `unitscale pretrain`. Its variants have the same data, steps and batches:

    standard    the model as it is, at the best of its learning rates
    umup        UnitScaling(lr_units="umup"), at the best of its own
    drop-in     UnitScaling(), at the rate that was the untouched model's best

The first seed is run at all rates, and where the best is at the edge, at the next ones too (`beyond`); the other seeds
at the best alone. It is chosen by the validation score that the task monitors; the table has the test score. A finished
run is one line in `runs.jsonl`; runs that are there with the same settings are not run again, so an interrupted sweep
goes on where it stopped. After a change of the package itself, delete that file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.learning_rates.grid import RateRun
from lightning_unitscale.cookbook.runs import check
from lightning_unitscale.cookbook.sweeps.results import Result
from lightning_unitscale.cookbook.sweeps.sweep import finish_runs
from lightning_unitscale.cookbook.tables import print_and_keep
from lightning_unitscale.cookbook.task_table.findings import claims, task_rows
from lightning_unitscale.cookbook.task_table.grid import added, first_runs, last_runs, measure_task, runs_beyond
from lightning_unitscale.cookbook.task_table.page import write_tasks_page
from lightning_unitscale.cookbook.task_table.tables import markdown, printed
from lightning_unitscale.errors import InputError

Configurations = Mapping[RateRun, DictConfig]


@recipe("tasks")
def main(cfg: DictConfig) -> None:
    """Runs what is not finished yet, then reports."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    check_sweep(cfg)
    runs = added(cfg, first_runs(cfg), {})
    for of_run in runs.values():
        check(of_run)
    results = finish(cfg, runs, folder)
    for _ in range(cfg.beyond):
        runs = added(cfg, runs_beyond(cfg, results), runs)
        results = finish(cfg, runs, folder)
    runs = added(cfg, last_runs(cfg, results), runs)
    report(cfg, finish(cfg, runs, folder), runs, folder)


def check_sweep(cfg: DictConfig) -> None:
    """Raises InputError for a sweep over nothing."""
    for key in ("tasks", "seeds"):
        if not cfg[key]:
            raise InputError(f"{key} is empty: there is nothing to run")
    if not any(settings.rates for settings in cfg.variants.values()):
        raise InputError("variants.*.rates are all empty: give exponents k of learning rates 2^k")


def finish(cfg: DictConfig, runs: Configurations, folder: Path) -> list[Result[RateRun]]:
    """The results of all these runs that are finished, after doing those that were not."""
    options = {"threads": cfg.threads, "processes": cfg.processes, "only_report": cfg.only_report}
    return list(finish_runs(runs, folder / "runs.jsonl", measure=measure_task, **options).values())


def report(cfg: DictConfig, results: list[Result[RateRun]], runs: Configurations, folder: Path) -> None:
    """Prints the table; saves it as text, Markdown and page."""
    variants = [str(name) for name in cfg.variants]
    rows = task_rows(cfg, results, runs)
    sentences = [f"{'yes' if holds else 'NO '} {claim}" for holds, claim in claims(rows, variants)]
    sentences += [f"{len(results)} of {len(runs)} runs are finished"] if len(results) < len(runs) else []
    print_and_keep(folder / "tasks.txt", printed(rows, variants), *sentences, width=140)
    (folder / "tasks.md").write_text(markdown(rows, variants))
    print(f"page: {write_tasks_page(folder, rows, results, variants, sentences)}")


if __name__ == "__main__":
    main()
