"""Distil a trained model into a smaller one, beside the same small model trained without a teacher.

    unitscale distill                                                  # = python recipes/distill.py: a language model
    unitscale distill experiment=distill_translation                   # or distill_dialogue, distill_digits
    unitscale distill teacher.path=outputs/pretrain/…    # your own teacher: a run, a checkpoint or a folder
    unitscale distill student.config.num_hidden_layers=1 distillation.temperature=4
    unitscale distill -m seed=1,2,3 teacher.path=…                     # more than one seed
    unitscale distill ckpt_path=outputs/distill/…/student_alone/last.ckpt   # go on with an interrupted run

Both students have the same initial weights, batches, steps and unit scaling. One learns from the data alone; the other
also from the teacher, which is only read:

    loss = (1 - α) · the task's own + α · T² · KL(teacher at T ‖ student at T) + β · MSE(hidden states)

with the temperature T (`lightning_unitscale.cookbook.tasks.distillation` says why).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

import pytorch_lightning as pl
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.callbacks import BestCheckpoint, LastCheckpoint
from lightning_unitscale.cookbook.checks import (
    check_checkpoint,
    check_data,
    fit_to_context,
    say_shorter_warm_up,
    validate_before_the_end,
)
from lightning_unitscale.cookbook.distillation_results import DistillationResults
from lightning_unitscale.cookbook.inference.evaluation import around
from lightning_unitscale.cookbook.run_report import RunReport
from lightning_unitscale.cookbook.runs import callback_of, fit, leave, new_trainer
from lightning_unitscale.cookbook.tasks import Task
from lightning_unitscale.cookbook.tasks.distillation import check_distillation
from lightning_unitscale.cookbook.teacher import check_fits, get_teacher, new_student
from lightning_unitscale.cookbook.wrong_values import check_numbers


@recipe("distill")
def main(cfg: DictConfig) -> float:
    """Trains both students and prints them beside the teacher; returns the distilled one's test loss."""
    begin = time.perf_counter()
    check(cfg)
    folder = Path(cfg.ckpt_path).parents[1] if cfg.ckpt_path else Path(cfg.folder)
    task: type[Task] = get_class(cfg.task._target_)
    examples = instantiate(cfg.data[cfg.task.data])
    classes = task.classes(examples)
    teacher = get_teacher(cfg, folder)
    fit_to_context(cfg, teacher.model)
    check_fits(cfg, teacher, classes)
    data = task.data_module(examples, teacher, cfg)

    results = DistillationResults(folder, go_on=bool(cfg.ckpt_path))
    if "teacher" not in results:
        tester = instantiate(cfg.trainer, logger=False, enable_checkpointing=False, _convert_="all")
        results.add("teacher", teacher.model, tester.test(around(task, teacher), data, verbose=False)[0])
    for name, taught in (("student alone", False), ("student with teacher", True)):
        if name not in results:
            student = new_student(cfg, teacher, classes, taught=taught)
            scores = train(cfg, name, student, data, folder / name.replace(" ", "_"))
            if not scores:
                return math.inf
            results.add(name, student.model, scores)
    results.show()
    print(f"{time.perf_counter() - begin:.0f} s; checkpoints and logs in {folder}")
    return float(results.rows["student with teacher"]["loss"])


def check(cfg: DictConfig) -> None:
    """Raises InputError for settings that would fail late or obscurely."""
    check_numbers(cfg)
    validate_before_the_end(cfg)
    say_shorter_warm_up(cfg)
    check_distillation(cfg.distillation)
    check_data(cfg)
    check_checkpoint(cfg)
    task: type[Task] = get_class(cfg.task._target_)
    task.check(cfg)


def train(cfg: DictConfig, name: str, student: Task, data: pl.LightningDataModule, folder: Path) -> Mapping[str, float]:
    """One student from its initial weights, or its last checkpoint; returns its test scores at its best one.

    None if it was stopped.
    """
    cfg = cfg.copy()
    cfg.folder = str(folder)
    unitscale = instantiate(cfg.unitscale) if cfg.unitscale else None
    trainer = new_trainer(cfg, unitscale)
    data_in_words = cfg.data[cfg.task.data]._target_
    report = RunReport(cfg, trainer, title=f"distill: {name}", score="test/loss", data=data_in_words)
    best, last = callback_of(trainer, BestCheckpoint), callback_of(trainer, LastCheckpoint)
    stopped = fit(trainer, student, data, last.path if cfg.ckpt_path and last.path.is_file() else None)
    scores: Mapping[str, float] = {}
    if not stopped:
        (scores,) = trainer.test(student, data, ckpt_path=best.best_model_path, verbose=False)
    report.end(unitscale, stopped, scores)
    if stopped:
        leave(trainer, stopped)
    return scores


if __name__ == "__main__":
    main()
