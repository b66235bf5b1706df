"""The trained model that a student learns from."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from omegaconf import DictConfig

from lightning_unitscale.cookbook.data import IGNORED, TokenText
from lightning_unitscale.cookbook.heads import CAUSAL_LM
from lightning_unitscale.cookbook.model_path import load_pretrained
from lightning_unitscale.cookbook.pretrained import Pretrained
from lightning_unitscale.cookbook.runs import train_base
from lightning_unitscale.cookbook.tasks.distillation import Outside
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
    if teacher.head != CAUSAL_LM:
        raise InputError(f"teacher.path={path} is a {type(teacher.model).__name__}, not a model that predicts tokens")
    if teacher.tokenizer is None:
        raise InputError(f"teacher.path={path} has no tokenizer beside it; name one: teacher.tokenizer=<path>")
    return teacher


def check_fits(cfg: DictConfig, teacher: Pretrained) -> None:
    """Raises InputError where the student can't learn from this teacher."""
    config, theirs = cfg.student.config, teacher.model.config.get_text_config()
    if config["vocab_size"] != theirs.vocab_size:
        raise InputError(
            f"student.config.vocab_size={config['vocab_size']}, but the teacher has {theirs.vocab_size} tokens; "
            "they must be the same"
        )
    context = getattr(theirs, "max_position_embeddings", None)
    if context is not None and cfg.task.sequence_length > context:
        raise InputError(
            f"task.sequence_length={cfg.task.sequence_length} is longer than the teacher's context of {context} tokens"
        )
    if cfg.distillation.hidden and config.get("hidden_size") != theirs.hidden_size:
        raise InputError(
            f"distillation.hidden compares hidden states, but the student's width is {config.get('hidden_size')} and "
            f"the teacher's {theirs.hidden_size}; set distillation.hidden=0, or give both the same width"
        )


def test_loss(teacher: Pretrained, data: TokenText) -> float:
    """The teacher's own loss on the test text, in nats per token."""
    total, count = 0.0, 0
    outside = Outside(teacher.model)
    for batch in data.test_dataloader():
        logits, labels = outside(batch["input_ids"], False).logits, batch["labels"]
        total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"))
        count += int((labels != IGNORED).sum())
    return total / count
