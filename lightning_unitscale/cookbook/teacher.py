"""The trained model that a student learns from, and the student."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.utils import get_class
from omegaconf import DictConfig

from lightning_unitscale.cookbook.heads import class_names, new_model
from lightning_unitscale.cookbook.model_path import load_pretrained
from lightning_unitscale.cookbook.pretrained import Pretrained
from lightning_unitscale.cookbook.runs import plain, train_base
from lightning_unitscale.cookbook.tasks import Task
from lightning_unitscale.cookbook.tasks.classification import numbers_of
from lightning_unitscale.cookbook.tasks.distillation import student_of
from lightning_unitscale.cookbook.tokenizers import BYTES
from lightning_unitscale.errors import InputError


def get_teacher(cfg: DictConfig, run_folder: Path) -> Pretrained:
    """The model of `teacher.path`; without one, a model trained now."""
    path = cfg.teacher.path
    if not path:
        path = run_folder / "teacher.ckpt"
        if cfg.ckpt_path and not path.is_file():
            raise InputError(f"the run of ckpt_path={cfg.ckpt_path} trained no teacher; give teacher.path as it did")
        if not cfg.ckpt_path:
            print(f"No teacher.path: training a teacher first (unitscale pretrain {' '.join(cfg.teacher.base)})")
            train_base(cfg.teacher.base, path)
            print(f"use it again with teacher.path={path}")
    teacher = load_pretrained(str(path), tokenizer=cfg.teacher.tokenizer)
    if teacher.head != cfg.task.head:
        raise InputError(
            f"teacher.path={path} is a {type(teacher.model).__name__}, and this task is for {cfg.task.head}; give "
            "another teacher, or task=… and data=… that fit"
        )
    if teacher.tokenizer is None and "sequence_length" in cfg.task:
        raise InputError(f"teacher.path={path} has no tokenizer beside it; name one: teacher.tokenizer=<path>")
    return teacher


def check_fits(cfg: DictConfig, teacher: Pretrained, classes: Sequence[str]) -> None:
    """Raises InputError where the student can't learn from this teacher."""
    config = new_model(_student_config(cfg, classes), cfg.task.head).config.get_text_config()
    theirs = teacher.model.config.get_text_config()
    own, known = getattr(config, "vocab_size", None), getattr(theirs, "vocab_size", None)
    if own != known:
        raise InputError(f"student.config.vocab_size={own}, but the teacher has {known} tokens; they must be the same")
    if classes and list(numbers_of(teacher.model.config)) != list(classes):
        raise InputError(
            f"the teacher tells apart {', '.join(numbers_of(teacher.model.config))}, not the data's classes"
        )
    if cfg.distillation.hidden and config.hidden_size != theirs.hidden_size:
        raise InputError(
            f"distillation.hidden compares hidden states, but the student's width is {config.hidden_size} and "
            f"the teacher's {theirs.hidden_size}; set distillation.hidden=0, or give both the same width"
        )


def new_student(cfg: DictConfig, teacher: Pretrained, classes: Sequence[str], *, taught: bool) -> Task:
    """The student with the seed's initial weights; it learns from the teacher, or from the data alone."""
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    return student_of(get_class(cfg.task._target_))(
        model=_student_config(cfg, classes),
        head=teacher.head,
        optimizer=plain(cfg.optimizer),
        schedule=plain(cfg.schedule),
        tokenizer=(teacher.tokenizer.name_or_path or BYTES) if teacher.tokenizer is not None else None,
        distillation=plain(cfg.distillation),
        teacher=teacher.model if taught else None,
    )


def _student_config(cfg: DictConfig, classes: Sequence[str]) -> dict[str, Any]:
    return {**plain(cfg.student.config), **class_names(classes)}
