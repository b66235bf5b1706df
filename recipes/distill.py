"""Distil a trained language model into a smaller one, beside the same small model trained without a teacher.

    unitscale distill                                                  # = python recipes/distill.py
    unitscale distill teacher.path=outputs/pretrain/…/last.ckpt        # your own teacher: a checkpoint or a folder
    unitscale distill student.config.num_hidden_layers=1 distillation.temperature=4
    unitscale distill -m seed=1,2,3 teacher.path=…                     # more than one seed
    unitscale distill ckpt_path=outputs/distill/…/student_alone/last.ckpt   # go on with an interrupted run

Both students have the same initial weights, batches, steps and unit scaling. One learns from the text alone; the other
also from the teacher, which is only read:

    loss = (1 - α) · CE(student, next token) + α · T² · KL(teacher at T ‖ student at T) + β · MSE(hidden states)

with the temperature T (`lightning_unitscale.cookbook.tasks.distillation` says why).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import PreTrainedModel

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.callbacks import BestCheckpoint, Interrupted, LastCheckpoint
from lightning_unitscale.cookbook.checks import check_checkpoint, check_whole_numbers, validate_before_the_end
from lightning_unitscale.cookbook.data import TokenText
from lightning_unitscale.cookbook.distillation_results import DistillationResults
from lightning_unitscale.cookbook.pretrained import Pretrained
from lightning_unitscale.cookbook.run_report import report_run
from lightning_unitscale.cookbook.runs import callback_of, fit, new_trainer, plain
from lightning_unitscale.cookbook.tasks.distillation import Student
from lightning_unitscale.cookbook.teacher import check_fits, get_teacher, test_loss
from lightning_unitscale.cookbook.tokenizers import BYTES
from lightning_unitscale.errors import InputError


@recipe("distill")
def main(cfg: DictConfig) -> float:
    """Trains both students and prints them beside the teacher; returns the distilled one's test loss."""
    begin = time.perf_counter()
    check(cfg)
    folder = Path(cfg.ckpt_path).parents[1] if cfg.ckpt_path else Path(cfg.folder)
    documents = instantiate(cfg.data.documents)
    teacher = get_teacher(cfg, folder)
    check_fits(cfg, teacher)
    data = Student.data_module(documents, teacher, cfg)

    results = DistillationResults(folder, go_on=bool(cfg.ckpt_path))
    if "teacher" not in results:
        results.add("teacher", teacher.model, test_loss(teacher, data))
    for name, model in (("student alone", None), ("student with teacher", teacher.model)):
        if name not in results:
            module, loss = train(cfg, name, model, teacher, data, folder / name.replace(" ", "_"))
            results.add(name, module.model, loss)
    results.show()
    print(f"{time.perf_counter() - begin:.0f} s; checkpoints and logs in {folder}")
    return float(results.rows["student with teacher"]["test loss"])


def check(cfg: DictConfig) -> None:
    """Raises InputError for settings that would fail late or obscurely."""
    check_whole_numbers(cfg, "trainer.max_steps", "data.batch_size", "task.sequence_length")
    validate_before_the_end(cfg)
    settings = cfg.distillation
    if settings.temperature <= 0:
        raise InputError(f"distillation.temperature={settings.temperature} must be positive")
    if not 0 <= settings.logits <= 1:
        raise InputError(f"distillation.logits={settings.logits} must lie between 0 and 1")
    if settings.hidden < 0:
        raise InputError(f"distillation.hidden={settings.hidden} must not be negative")
    check_checkpoint(cfg)
    if "documents" not in cfg.data:
        raise InputError("distillation needs data with `documents`: data=topics, text, hf or python_source")


def train(
    cfg: DictConfig, name: str, taught_by: PreTrainedModel | None, teacher: Pretrained, data: TokenText, folder: Path
) -> tuple[Student, float]:
    """One student from the seed's initial weights, or its last checkpoint; and its test loss at its best one."""
    cfg = cfg.copy()
    cfg.folder = str(folder)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    module = Student(
        model=plain(cfg.student.config),
        head=teacher.head,
        optimizer=plain(cfg.optimizer),
        schedule=plain(cfg.schedule),
        tokenizer=teacher.text_tokenizer().name_or_path or BYTES,
        distillation=plain(cfg.distillation),
        teacher=taught_by,
    )
    unitscale = instantiate(cfg.unitscale) if cfg.unitscale else None
    trainer = new_trainer(cfg, unitscale)
    best, last = callback_of(trainer, BestCheckpoint), callback_of(trainer, LastCheckpoint)
    stopped = fit(trainer, module, data, last.path if cfg.ckpt_path and last.path.is_file() else None)
    scores: Mapping[str, float] = {}
    if not stopped:
        (scores,) = trainer.test(module, data, ckpt_path=best.best_model_path, verbose=False)
    report_run(
        *(cfg, trainer, unitscale, stopped),
        title=f"distill: {name}",
        score="test/loss",
        metrics=scores,
        data=cfg.data.documents._target_,
    )
    if stopped:
        sys.exit(130 if isinstance(stopped, Interrupted) else 1)
    return module, scores["test/loss"]


if __name__ == "__main__":
    main()
