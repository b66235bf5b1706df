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

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.callbacks import BestCheckpoint, Interrupted, LastCheckpoint
from lightning_unitscale.cookbook.checks import check_checkpoint, check_whole_numbers, validate_before_the_end
from lightning_unitscale.cookbook.data import TokenText
from lightning_unitscale.cookbook.pretrained import Pretrained
from lightning_unitscale.cookbook.run_record import in_words, run_facts
from lightning_unitscale.cookbook.runs import callback_of, fit, new_trainer, plain
from lightning_unitscale.cookbook.tasks.distillation import Student
from lightning_unitscale.cookbook.teacher import check_fits, get_teacher, test_loss
from lightning_unitscale.cookbook.tokenizers import BYTES
from lightning_unitscale.errors import InputError
from lightning_unitscale.monitor.report import write_report

RESULTS = "distill.json"  # of a run, in its folder: parameters and test loss by name


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

    rows = rows_done(folder) if cfg.ckpt_path else {}
    if "teacher" not in rows:
        note(rows, "teacher", teacher.model, test_loss(teacher, data), folder)
    for name, model in (("student alone", None), ("student with teacher", teacher.model)):
        if name not in rows:
            module, loss = train(cfg, name, model, teacher, data, folder / name.replace(" ", "_"))
            note(rows, name, module.model, loss, folder)
    show(rows)
    print(f"{time.perf_counter() - begin:.0f} s; checkpoints and logs in {folder}")
    return float(rows["student with teacher"]["test loss"])


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
    plan = unitscale.plan if unitscale else None
    about: dict[str, Any] = {
        "title": f"distill: {name}",
        "facts": run_facts(cfg, trainer, cfg.data.documents._target_),
        "scaling": in_words(plan),
        "plan": plan.summary() if plan else "no unit scaling",
    }
    numbers = {"parameters": module.model.num_parameters(), "steps": trainer.global_step}
    if stopped:
        write_report(folder, ending=f"{name}: {stopped}", metrics=numbers, **about)
        print(f"\n{name}: {stopped}")
        sys.exit(130 if isinstance(stopped, Interrupted) else 1)
    (scores,) = trainer.test(module, data, ckpt_path=best.best_model_path, verbose=False)
    page = write_report(folder, score="test/loss", metrics={**scores, **numbers}, **about)
    print(f"report {page}")
    return module, scores["test/loss"]


def rows_done(folder: Path) -> dict[str, Any]:
    """What an interrupted run in this folder has finished."""
    file = folder / RESULTS
    return json.loads(file.read_text()) if file.is_file() else {}


def note(rows: dict[str, Any], name: str, model: PreTrainedModel, loss: float, folder: Path) -> None:
    """Add a row, and write all of them."""
    rows[name] = {"parameters": model.num_parameters(), "test loss": loss}
    (folder / RESULTS).write_text(json.dumps(rows, indent=1))


def show(rows: Mapping[str, Any]) -> None:
    """The table."""
    table = Table(title="Distillation")
    table.add_column("")
    table.add_column("parameters", justify="right")
    table.add_column("test loss, nats per token", justify="right")
    for name, row in rows.items():
        table.add_row(name, f"{row['parameters']:,}", f"{row['test loss']:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
