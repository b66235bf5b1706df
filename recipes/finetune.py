"""Fine-tune a pretrained model: all of it, a part of its layers, or LoRA adapters.

    unitscale finetune                                       # = python recipes/finetune.py: from documentation to code
    unitscale finetune model.path=outputs/pretrain/…   # a run, a checkpoint, a folder or a hub name to start from
    unitscale finetune experiment=text_classification        # also: digits, seq2seq, code
    unitscale finetune experiment=text_classification data=labelled_file data.path=reviews.csv model.path=my-bert
    unitscale finetune lora=all_linear                       # adapters, saved in peft's format
    unitscale finetune 'model.freeze=[model.embed_tokens,model.layers.0]'
    unitscale finetune task=any_head task.head=AutoModelForTokenClassification data=module data.module._target_=…
    unitscale finetune ckpt_path=outputs/finetune/…    # a run's folder: goes on exactly; other settings are kept

The model is left as it is (scheme preserve), or goes on in its own parametrization where its checkpoint has one; with
LoRA or another head the checkpoint's weights are taken as those of an ordinary model. The best checkpoint by held-out
score is kept, tested, and written as a folder for plain transformers.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytorch_lightning as pl
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.callbacks import BestCheckpoint
from lightning_unitscale.cookbook.checks import (
    check_checkpoint,
    check_data,
    fit_to_context,
    say_shorter_warm_up,
    validate_before_the_end,
)
from lightning_unitscale.cookbook.run_report import RunReport
from lightning_unitscale.cookbook.runs import callback_of, fit, leave, new_trainer, plain, show
from lightning_unitscale.cookbook.starting_point import module_around, scaling_of, starting_point
from lightning_unitscale.cookbook.tasks import Task
from lightning_unitscale.cookbook.transformers_folder import write_folders
from lightning_unitscale.cookbook.wrong_values import check_numbers
from lightning_unitscale.errors import InputError


@recipe("finetune")
def main(cfg: DictConfig) -> float:
    """Trains, keeps the best checkpoint, tests and exports it; returns the monitored score (what a sweep optimizes)."""
    begin = time.perf_counter()
    check(cfg)
    say_shorter_warm_up(cfg)
    task: type[Task] = get_class(cfg.task._target_)
    examples = instantiate(cfg.data[cfg.task.data])
    pl.seed_everything(cfg.seed, workers=True)
    start = starting_point(cfg, task.classes(examples), Path(cfg.folder))
    fit_to_context(cfg, start.model)
    data = task.data_module(examples, start, cfg)
    unitscale = scaling_of(cfg, start)
    module = module_around(cfg, start)
    trainer = new_trainer(cfg, unitscale)
    best = callback_of(trainer, BestCheckpoint)
    report = RunReport(
        *(cfg, trainer),
        title=f"finetune: {cfg.model.path or 'a model made in this run'}",
        score=f"best {cfg.task.monitor}",
        data=cfg.data[cfg.task.data]._target_,
    )

    before = trainer.test(module, data, verbose=False)[0] if cfg.test_before and not cfg.ckpt_path else {}
    stopped = fit(trainer, module, data, cfg.ckpt_path)
    metrics = {f"{name}, before": value for name, value in before.items()}
    if not stopped:
        metrics.update(trainer.test(module, data, ckpt_path=best.best_model_path, verbose=False)[0])
    if best.best_model_score is not None:  # always, but for an end before the first validation
        metrics[f"best {cfg.task.monitor}"] = float(best.best_model_score)
    shown: list[str | Path] = []
    if not stopped and trainer.is_global_zero:
        shown = show(module, data.test_dataloader(), Path(cfg.folder) / "report", plain(cfg.task))
    if trainer.is_global_zero:
        metrics["seconds"] = round(time.perf_counter() - begin, 1)
        report.end(unitscale, stopped, metrics, shown)
    if stopped:
        leave(trainer, stopped)
        return math.nan
    if trainer.is_global_zero:
        print(f"best checkpoint {best.best_model_path}")
        for line in write_folders(module, Path(cfg.folder)):
            print(line)
    return metrics[f"best {cfg.task.monitor}"]


def check(cfg: DictConfig) -> None:
    """Raises InputError for settings that would fail late or obscurely."""
    check_numbers(cfg)
    check_data(cfg)
    task: type[Task] = get_class(cfg.task._target_)
    if task.heads and cfg.task.head not in task.heads:
        raise InputError(
            f"task.head={cfg.task.head} does not go with {cfg.task._target_}, which is for "
            f"{' and '.join(task.heads)}; any other head is trained with task=any_head and data=module"
        )
    task.check(cfg)
    validate_before_the_end(cfg)
    if not any((cfg.model.path, cfg.model.base, cfg.model.config)):
        raise InputError("there is no model to start from; give one: model.path=<checkpoint, folder or hub name>")
    check_checkpoint(cfg)


if __name__ == "__main__":
    main()
