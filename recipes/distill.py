"""Distil a trained language model into a smaller one, beside the same small model trained without a teacher.

    unitscale distill                                                  # = python recipes/distill.py
    unitscale distill teacher.path=outputs/pretrain/…/last.ckpt        # your own teacher: a checkpoint or a folder
    unitscale distill student.config.num_hidden_layers=1 distillation.temperature=4
    unitscale distill -m seed=1,2,3 teacher.path=…                     # more than one seed
    unitscale distill ckpt_path=outputs/distill/…/student_alone/last.ckpt   # go on with an interrupted run

Both students have the same initial weights, batches, steps and unit scaling. One learns from the text alone; the other
also from the teacher, which is only read:

    loss = (1 - α) · CE(student, next token) + α · T² · KL(teacher at T ‖ student at T) + β · MSE(hidden states)

Logits are divided by the temperature T; T² keeps the gradient's size (Hinton et al., 2015, arXiv 1503.02531). Hidden
states are compared after RMS normalisation, layer by layer, where the widths match.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from finetune import check_interval
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pretrain import Progress
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_unitscale.checkpoint import read_checkpoint
from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.continuation import BestCheckpoint, RandomNumbers
from lightning_unitscale.cookbook.data import IGNORED
from lightning_unitscale.cookbook.data.examples import Batch
from lightning_unitscale.cookbook.data.token_text import TokenText
from lightning_unitscale.cookbook.interrupt import Interrupted, LastCheckpoint
from lightning_unitscale.cookbook.pretrained import BYTES, CAUSAL_LM, Pretrained, load_pretrained
from lightning_unitscale.cookbook.runs import train_base
from lightning_unitscale.cookbook.tasks import LanguageModeling
from lightning_unitscale.errors import InputError
from lightning_unitscale.monitor.report import write_report

# ----------------------------------------------------------------------------------------------------------------------
# The student


class Student(LanguageModeling):
    """A language model that also learns from another one's predictions; its held-out loss is that of the text alone.

    Args:
        distillation: temperature, logits (α) and hidden (β), see above; checkpoints don't hold the teacher.
        teacher: a model with the same vocabulary; None trains on the text alone.
    """

    def __init__(
        self, *args: Any, distillation: Mapping[str, float], teacher: nn.Module | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.save_hyperparameters(ignore=["weights", "teacher"])
        self.distillation = dict(distillation)
        self.teacher = Outside(teacher) if teacher is not None else None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One batch, through the teacher too."""
        if self.teacher is None:
            return super().training_step(batch, batch_idx)
        settings = self.distillation
        wants_hidden = settings["hidden"] > 0
        output = self.model(input_ids=batch["input_ids"], use_cache=False, output_hidden_states=wants_hidden)
        taught = self.teacher(batch["input_ids"], wants_hidden)
        counts = batch["labels"] != IGNORED  # [batch, sequence]
        cross_entropy = F.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)
        divergence = distance_of_logits(output.logits[counts], taught.logits[counts], settings["temperature"])
        loss: Tensor = (1 - settings["logits"]) * cross_entropy + settings["logits"] * divergence
        if wants_hidden:
            loss = loss + settings["hidden"] * distance_of_hidden_states(output.hidden_states, taught.hidden_states)
        self.log_dict({"train/loss": cross_entropy, "train/distillation": divergence}, prog_bar=True)
        return loss


class Outside:
    """A frozen model that is no part of the module: not in its checkpoints, its optimizer or its unit scaling."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, hidden_states: bool) -> Any:
        """The output of the model, moved to where the tokens are."""
        self.model.to(tokens.device)
        return self.model(input_ids=tokens, use_cache=False, output_hidden_states=hidden_states)


def distance_of_logits(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) at temperature T, the mean over tokens; both [tokens, vocabulary]."""
    p, q = (F.log_softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)


def distance_of_hidden_states(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """Mean squared difference of RMS-1 hidden states, of each student's layer and the teacher's at the same depth."""
    last, width = len(student) - 1, student[0].shape[-1]
    pairs = [(student[i], teacher[round(i * (len(teacher) - 1) / last)]) for i in range(1, last + 1)]
    return torch.stack([F.mse_loss(F.rms_norm(s, (width,)), F.rms_norm(t, (width,))) for s, t in pairs]).mean()


# ----------------------------------------------------------------------------------------------------------------------
# The run


@recipe("distill")
def main(cfg: DictConfig) -> float:
    """Trains both students and prints them beside the teacher; returns the distilled one's test loss."""
    begin = time.perf_counter()
    check(cfg)
    run_folder = Path(cfg.ckpt_path).parents[1] if cfg.ckpt_path else Path(HydraConfig.get().runtime.output_dir)
    documents = instantiate(cfg.data.documents)
    teacher = get_teacher(cfg, run_folder)
    config: Any = OmegaConf.to_container(cfg.student.config, resolve=True)
    fits(cfg, config, teacher)
    data = TokenText(
        documents,
        teacher.tokenizer,
        sequence_length=cfg.task.sequence_length,
        batch_size=cfg.data.batch_size,
        steps=cfg.trainer.max_steps * cfg.trainer.accumulate_grad_batches,
        held_out=cfg.data.held_out,
        seed=cfg.seed,
        workers=cfg.data.workers,
    )

    rows = rows_done(run_folder) if cfg.ckpt_path else {}
    if "teacher" not in rows:
        note(rows, "teacher", teacher.model, test_teacher(cfg, teacher, data), run_folder)
    for name, model in (("student alone", None), ("student with teacher", teacher.model)):
        if name not in rows:
            module, loss = train(cfg, config, name, model, teacher, data, run_folder)
            note(rows, name, module.model, loss, run_folder)
    report(rows, run_folder, time.perf_counter() - begin)
    return float(rows["student with teacher"]["test loss"])


def check(cfg: DictConfig) -> None:
    """Raises InputError for settings that would fail late or obscurely."""
    for key in ("trainer.max_steps", "data.batch_size", "task.sequence_length"):
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{key}={value} must be a positive whole number")
    check_interval(cfg)
    settings = cfg.distillation
    if settings.temperature <= 0:
        raise InputError(f"distillation.temperature={settings.temperature} must be positive")
    if not 0 <= settings.logits <= 1:
        raise InputError(f"distillation.logits={settings.logits} must lie between 0 and 1")
    if settings.hidden < 0:
        raise InputError(f"distillation.hidden={settings.hidden} must not be negative")
    if cfg.ckpt_path and not Path(cfg.ckpt_path).is_file():
        raise InputError(f"ckpt_path={cfg.ckpt_path}: no such file (looked in {Path.cwd()})")
    if cfg.ckpt_path:
        read_checkpoint(cfg.ckpt_path)
    if "documents" not in cfg.data:
        raise InputError("distillation needs data with `documents`: data=topics, text, hf or python_source")


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


def fits(cfg: DictConfig, config: Mapping[str, Any], teacher: Pretrained) -> None:
    """Raises InputError where the student can't learn from this teacher."""
    theirs = teacher.model.config.get_text_config()
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


def train(
    cfg: DictConfig,
    config: dict[str, Any],
    name: str,
    teacher_model: nn.Module | None,
    teacher: Pretrained,
    data: TokenText,
    run_folder: Path,
) -> tuple[Student, float]:
    """One student from the seed's initial weights, or its last checkpoint; and its test loss at its best one."""
    assert teacher.tokenizer is not None
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    settings: Any = {
        key: OmegaConf.to_container(cfg[key], resolve=True) for key in ("optimizer", "schedule", "distillation")
    }
    module = Student(
        model=config,
        head=teacher.head,
        tokenizer=teacher.tokenizer.name_or_path or BYTES,
        teacher=teacher_model,
        **settings,
    )
    folder = run_folder / name.replace(" ", "_")
    best = BestCheckpoint(folder, filename="best", monitor="val/loss", enable_version_counter=False)
    last = LastCheckpoint(folder / "last.ckpt")
    unitscale = instantiate(cfg.unitscale) if cfg.unitscale else None
    monitor = instantiate(cfg.monitor, folder=folder) if cfg.monitor else None
    trainer: pl.Trainer = instantiate(
        cfg.trainer,
        callbacks=[
            *([unitscale] if unitscale else []),
            *([monitor] if monitor else []),
            best,
            RandomNumbers(),
            last,
            *([Progress(leave=True)] if cfg.trainer.enable_progress_bar else []),
        ],
        logger=pl.loggers.CSVLogger(folder, name="csv", version=""),
        _convert_="all",
    )
    with suppress(Interrupted):
        trainer.fit(module, data, ckpt_path=last.path if cfg.ckpt_path and last.path.is_file() else None)
    if last.interrupted:
        print(f"\nStopped at step {trainer.global_step} of the {name}. Continue with: ckpt_path={last.path}")
        sys.exit(130)
    (scores,) = trainer.test(module, data, ckpt_path=best.best_model_path, verbose=False)
    page = write_report(
        folder,
        title=f"distill: {name}",
        metrics={**scores, "parameters": size(module.model), "steps": trainer.global_step},
        plan=unitscale.plan.summary() if unitscale else "no unit scaling",
    )
    print(f"report {page}")
    return module, scores["test/loss"]


def test_teacher(cfg: DictConfig, teacher: Pretrained, data: TokenText) -> float:
    """The teacher's own loss on the test text, in nats per token."""
    total, count = 0.0, 0
    outside = Outside(teacher.model)
    for batch in data.test_dataloader():
        logits, labels = outside(batch["input_ids"], False).logits, batch["labels"]
        total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"))
        count += int((labels != IGNORED).sum())
    return total / count


def size(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


RESULTS = "distill.json"  # of a run, in its folder


def rows_done(folder: Path) -> dict[str, Any]:
    """What an interrupted run in this folder has finished: parameters and test loss by name."""
    file = folder / RESULTS
    return json.loads(file.read_text()) if file.is_file() else {}


def note(rows: dict[str, Any], name: str, model: nn.Module, loss: float, folder: Path) -> None:
    """Add a row, and write all of them."""
    rows[name] = {"parameters": size(model), "test loss": loss}
    (folder / RESULTS).write_text(json.dumps(rows, indent=1))


def report(rows: Mapping[str, Any], folder: Path, seconds: float) -> None:
    """The table."""
    table = Table(title="Distillation")
    table.add_column("")
    table.add_column("parameters", justify="right")
    table.add_column("test loss, nats per token", justify="right")
    for name, row in rows.items():
        table.add_row(name, f"{row['parameters']:,}", f"{row['test loss']:.4f}")
    Console().print(table)
    print(f"{seconds:.0f} s; checkpoints and logs in {folder}")


if __name__ == "__main__":
    main()
