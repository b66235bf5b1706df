"""Compare number formats by what a language model learns in them.

    unitscale formats                                 # = python recipes/formats.py; 18 runs, half an hour on two cores
    unitscale formats seeds=[1] model.width=64
    unitscale formats model.width=256 only=[umup,umup-fp8]
    unitscale formats '+variants.mine=[unitscale.format=fp8,unitscale.recalibrate=[100]]'

Every run is the recipe `pretrain` with some overrides, the same text, steps and batches. A finished run is one line in
`runs.jsonl`; runs that are there with the same settings are not run again. After a change of the package itself, delete
that file. On a CPU the casts are real and the products are made of upcast operands: what is measured is accuracy, and
FP8 is slower here than no format.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from transfer import many_runs, measure, settings

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.runs import check
from lightning_unitscale.errors import InputError


@dataclass(frozen=True)
class Result:
    """A finished run: one line of `runs.jsonl`; `held_out` in nats per byte, None where training diverged."""

    variant: str
    seed: int
    settings: str
    held_out: float | None
    seconds: float


def chosen(cfg: DictConfig) -> list[str]:
    """The names of the variants to compare.

    Raises:
        InputError: `only` names one that there is not.
    """
    known = [str(name) for name in cfg.variants]
    wanted = known if cfg.only is None else [str(name) for name in cfg.only]
    if unknown := [name for name in wanted if name not in known]:
        raise InputError(f"only={','.join(unknown)}: there are the variants {', '.join(known)}")
    return wanted


def configuration(cfg: DictConfig, variant: str, seed: int) -> DictConfig:
    """The settings of `unitscale pretrain` for one run.

    Raises:
        InputError: an override of the variant is not one of that recipe.
    """
    cfg = cfg.copy()
    cfg.seed = seed
    cfg.trainer.val_check_interval = cfg.trainer.max_steps * cfg.trainer.accumulate_grad_batches
    try:
        cfg.merge_with_dotlist(list(cfg.variants[variant]))
    except OmegaConfBaseException as error:
        raise InputError(f"variants.{variant}: {error}".replace("\n", " ")) from error
    return cfg


def finished(file: Path) -> dict[str, Result]:
    """The runs in the file, by the hash of their settings; a line cut short by an interrupt doesn't count."""
    results = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            result = Result(**json.loads(line))
        except json.JSONDecodeError:
            continue
        results[result.settings] = result
    return results


def table(cfg: DictConfig, results: dict[str, list[Result]]) -> Table:
    """One row for each variant: the losses of its seeds, their mean, and how far that is from the first variant's."""
    made = Table(title=f"Held-out loss, nats per byte, width {cfg.model.width}, after {cfg.trainer.max_steps} steps")
    made.add_column("variant")
    for seed in cfg.seeds:
        made.add_column(f"seed {seed}", justify="right")
    made.add_column("mean", justify="right")
    made.add_column("to the first", justify="right")
    reference = mean(next(iter(results.values())))
    for variant, runs in results.items():
        losses = ["diverged" if run.held_out is None else f"{run.held_out:.3f}" for run in runs]
        average = mean(runs)
        change = f"{average / reference - 1:+.2%}" if math.isfinite(average) and math.isfinite(reference) else ""
        made.add_row(variant, *losses, f"{average:.3f}", change)
    return made


def mean(runs: list[Result]) -> float:
    """Of the seeds' held-out losses; infinite where one of them diverged."""
    return fmean(math.inf if run.held_out is None else run.held_out for run in runs)


@recipe("formats")
def main(cfg: DictConfig) -> None:
    """Runs what is not finished yet, then prints the table and writes it to formats.txt."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    variants = chosen(cfg)
    planned = {(variant, seed): configuration(cfg, variant, seed) for seed in cfg.seeds for variant in variants}
    for run in planned.values():
        check(run)
    many_runs(cfg.threads)
    file = folder / "runs.jsonl"
    known = finished(file)
    for number, ((variant, seed), run) in enumerate(planned.items(), start=1):
        if settings(run) in known:
            continue
        start = time.perf_counter()
        held_out, _ = measure(run)
        seconds = round(time.perf_counter() - start, 1)
        result = Result(variant, seed, settings(run), held_out if math.isfinite(held_out) else None, seconds)
        known[result.settings] = result
        with file.open("a") as lines:
            lines.write(json.dumps(asdict(result)) + "\n")
        print(f"[{number}/{len(planned)}] {variant}, seed {seed}: {held_out:.3f} ({seconds:.0f} s)", flush=True)
    by_variant = {v: [known[settings(planned[v, seed])] for seed in cfg.seeds] for v in variants}
    report = table(cfg, by_variant)
    Console().print(report)
    with (folder / "formats.txt").open("w") as text:
        Console(file=text, width=100).print(report)


if __name__ == "__main__":
    main()
