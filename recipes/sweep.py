"""Search for the hyperparameters of a scheme on a small job, and write what was chosen, ready for others.

    unitscale sweep                                          # = python recipes/sweep.py
    unitscale sweep model.width=64 trainer.max_steps=100     # on a smaller job
    unitscale sweep params.unitscale.hyperparameters.alpha_attn=[0.5,1,2,4]
    unitscale sweep search=[independent]                     # without random search beside it
    unitscale pretrain experiment=chosen --config-dir outputs/sweep model.width=512

Independent search (the learning rate first, then each other setting alone, the best of each combined at the end) beside
random search of the same grid with as many runs. Every run is the recipe `pretrain`; values are lists, or written as in
Hydra's own sweeps. A finished run is one line in `runs.jsonl` and is not run again. At the end: a table, and the best
settings of all runs in `experiment/chosen.yaml`, which `experiment=chosen` finds with `--config-dir`.

As `unitscale pretrain` returns its held-out loss, sweepers of Hydra search too, under any of its launchers, though they
do not go on after a stop: the same independent search, in any Hydra application, and Optuna's samplers
(pip install -e ".[optuna]"):

    unitscale pretrain -m hydra/sweeper=unitscale_independent unitscale.lr_units=umup \\
        'optimizer.lr=0.5,1,2,4' 'unitscale.hyperparameters.alpha_attn=0.5,1,2,4'
    unitscale pretrain -m hydra/sweeper=optuna hydra.sweeper.n_trials=20 unitscale.lr_units=umup \\
        'optimizer.lr=choice(0.5,1,2,4)' 'unitscale.hyperparameters.alpha_attn=interval(0.5,4)'
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.checks import check_known
from lightning_unitscale.cookbook.runs import check, plain
from lightning_unitscale.cookbook.sweeps.search import (
    Losses,
    SearchRun,
    best_of,
    independent_search,
    random_search,
)
from lightning_unitscale.cookbook.sweeps.space import Point, Space, read_space, with_point
from lightning_unitscale.cookbook.sweeps.sweep import finish_runs, run_configuration
from lightning_unitscale.cookbook.sweeps.table import at_edges, search_table
from lightning_unitscale.cookbook.tables import print_and_keep
from lightning_unitscale.errors import InputError

SEARCHES = ("independent", "random")


@recipe("sweep")
def main(cfg: DictConfig) -> float:
    """Runs what is not finished yet, prints the table, writes what was chosen; returns its held-out loss."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    space = read_space(plain(cfg.params))
    check_space(cfg, space)

    def evaluate(phase: str, points: Iterable[Point]) -> Losses:
        if not (points := list(points)):
            return {}  # nothing beside the learning rate is tried
        runs = {point: [SearchRun(phase, point, seed) for seed in cfg.seeds] for point in points}
        configurations = {
            run: with_point(run_configuration(cfg, run.seed), point) for point in points for run in runs[point]
        }
        results = finish_runs(configurations, folder / "runs.jsonl", threads=cfg.threads)
        return {point: fmean(results[run].held_out for run in runs[point]) for point in points}

    default = {name: OmegaConf.select(cfg, name) for name in space}
    found: dict[str, Losses] = {}
    if "independent" in cfg.search:
        found["independent"] = independent_search(space, cfg.rate, default, evaluate)
    if "random" in cfg.search:
        found["random"] = random_search(space, cfg.draw, evaluate)
    if not (losses := {point: loss for of_search in found.values() for point, loss in of_search.items()}):
        raise InputError(f"search=[] does nothing; choose from {', '.join(SEARCHES)}")
    chosen = best_of(losses)
    write_experiment(cfg, chosen, folder / "experiment" / "chosen.yaml")
    print_and_keep(folder / "sweep.txt", search_table(cfg, found, default), *at_edges(space, chosen))
    print(f"\nunitscale pretrain experiment=chosen --config-dir {folder}")
    return losses[chosen]


def check_space(cfg: DictConfig, space: Space) -> None:
    """Raises InputError for a setting or a value that no run can have."""
    check_known("search", cfg.search, SEARCHES)
    if cfg.rate not in space:
        raise InputError(f"params has no values of {cfg.rate}, which is searched first; give params.{cfg.rate}=…")
    for name, values in space.items():
        for value in values:
            one = with_point(cfg, ((name, value),))
            check(one)
            if one.unitscale:
                instantiate(one.unitscale)


def write_experiment(cfg: DictConfig, chosen: Point, file: Path) -> None:
    """The chosen settings, with all of the two groups that they mostly belong to, as an option of `experiment`."""
    best, choices = with_point(cfg, chosen), HydraConfig.get().runtime.choices
    content = OmegaConf.masked_copy(best, ["unitscale", "optimizer"])
    for name, value in chosen:
        OmegaConf.update(content, name, value, force_add=True)
    groups = [{f"override /{group}": choices[group]} for group in ("unitscale", "optimizer")]
    file.parent.mkdir(exist_ok=True)
    head = f"# @package _global_\n# Chosen by unitscale sweep at width {cfg.model.width}, seeds {list(cfg.seeds)}\n"
    file.write_text(head + OmegaConf.to_yaml(OmegaConf.create({"defaults": groups, **plain(content)})))


if __name__ == "__main__":
    main()
