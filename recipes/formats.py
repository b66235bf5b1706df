"""Compare number formats by what models of several kinds learn in them.

    unitscale formats                                 # = python recipes/formats.py; the main job, half an hour and more
    unitscale formats seeds=[1] model.width=64
    unitscale formats model.width=256 only=[umup,umup-fp8]
    unitscale formats jobs=[language,vit,unet] only=[umup,umup-fp8,umup-mxfp8,umup-nvfp4]
    unitscale formats '+variants.mine=["unitscale.format=fp8","unitscale.recalibrate=[100]"]'

Every run of the job `pretrain` is that recipe with some overrides, the same text, steps and batches; the others are
small models of `cookbook/jobs` (a language model, a vision transformer, a U-Net), with the same overrides. A finished
run is one line in `runs.jsonl`; runs that are there with the same settings are not run again. After a change of the
package itself, delete that file. On a CPU the casts are real and the products are made of upcast operands: what is
measured is accuracy, and FP8 is slower here than no format.
"""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.checks import check_known
from lightning_unitscale.cookbook.quality.grid import measure_job
from lightning_unitscale.cookbook.runs import check
from lightning_unitscale.cookbook.sweeps.sweep import finish_runs, measure_pretraining
from lightning_unitscale.cookbook.sweeps.variants import PRETRAIN, VariantRun, configuration, loss_table
from lightning_unitscale.cookbook.tables import print_and_keep
from lightning_unitscale.errors import InputError


@recipe("formats")
def main(cfg: DictConfig) -> None:
    """Runs what is not finished yet, then prints the table and writes it to formats.txt."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    variants = chosen(cfg)
    check_known("jobs", cfg.jobs, [PRETRAIN, *cfg.small_jobs])
    tables = []
    for job in cfg.jobs:
        runs = [VariantRun(variant, seed, job) for seed in cfg.seeds for variant in variants]
        configurations = {run: configuration(cfg, run) for run in runs}
        if job == PRETRAIN:
            for run_cfg in configurations.values():
                check(run_cfg)
        measure = measure_pretraining if job == PRETRAIN else measure_job
        results = finish_runs(configurations, folder / "runs.jsonl", measure=measure, threads=cfg.threads)
        losses = {name: [results[VariantRun(name, seed, job)].held_out for seed in cfg.seeds] for name in variants}
        tables.append(loss_table(cfg, job, losses))
    print_and_keep(folder / "formats.txt", *tables)


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


if __name__ == "__main__":
    main()
