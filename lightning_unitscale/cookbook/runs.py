"""A training run: its model and data, its callbacks and trainer, and its end; what the training recipes share."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import hydra
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Checkpoint, LearningRateMonitor, ProgressBar
from torch.utils.data import DataLoader

from lightning_unitscale.cookbook.callbacks import (
    Diverged,
    Interrupted,
    LastCheckpoint,
    Stopped,
    StopWhenDiverged,
    diverged,
)
from lightning_unitscale.cookbook.checks import (
    check_checkpoint,
    check_data,
    check_known,
    fit_to_context,
)
from lightning_unitscale.cookbook.fan_in import initialise_by_fan_in
from lightning_unitscale.cookbook.heads import class_names
from lightning_unitscale.cookbook.pretrained import Pretrained
from lightning_unitscale.cookbook.tasks import Task
from lightning_unitscale.cookbook.wrong_values import check_numbers
from lightning_unitscale.engine.record.spread_tensors import is_spread
from lightning_unitscale.errors import InputError
from lightning_unitscale.namespaces import callbacks_of

AnyCallback = TypeVar("AnyCallback", bound=pl.Callback)

DIVERGED, INTERRUPTED = 3, 130  # exit statuses, told in recipes/README.md

# ----------------------------------------------------------------------------------------------------------------------
# Any training


def plain(node: Any) -> Any:
    """A node of the configuration as dicts and lists, which a checkpoint can hold."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def new_trainer(cfg: DictConfig, scaling: pl.Callback | None = None) -> pl.Trainer:
    """The trainer of this configuration, with its monitor, callbacks and loggers.

    Args:
        cfg: of a training recipe.
        scaling: the unit scaling; None trains without.
    """
    nodes = [cfg.monitor, *cfg.callbacks.values()]
    callbacks = [*([scaling] if scaling else []), *(instantiate(node) for node in nodes if node)]
    if not cfg.trainer.enable_progress_bar:
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    loggers = [instantiate(logger) for logger in cfg.logger.values()]
    if not loggers:  # Lightning's raises without one
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    trainer: pl.Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers, _convert_="all")
    return trainer


def callback_of(trainer: pl.Trainer, kind: type[AnyCallback]) -> AnyCallback:
    """The trainer's callback of this kind.

    Raises:
        InputError: the configuration has none.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, kind):
            return callback
    raise InputError(f"this recipe needs a {kind.__name__} among its callbacks; leave it in the group callbacks")


def fit(
    trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, ckpt_path: str | Path | None
) -> Stopped | None:
    """Trains; returns what ended it before its end, if anything did: Ctrl-C, its last state saved, or divergence."""
    try:
        trainer.fit(module, data, ckpt_path=ckpt_path)
    except Stopped as stopped:
        return stopped
    return None


def diverged_at_its_end(trainer: pl.Trainer, learning_rate: float, held_out: float) -> Diverged | None:
    """What to say of a training whose own losses were numbers, where the held-out loss of its end is none."""
    if math.isfinite(held_out):
        return None
    return diverged(trainer, learning_rate, f"the held-out loss after step {trainer.global_step}", held_out)


def leave(trainer: pl.Trainer, stopped: Stopped) -> None:
    """Ends a run that was stopped, once all of it is written.

    As one run of several a divergence is a result, and the others go on. Processes beside the first end as others do:
    where one of them fails, Lightning kills the first.

    Raises:
        SystemExit: with status 130 after Ctrl-C, 3 after a divergence.
    """
    if not trainer.is_global_zero:
        return
    if isinstance(stopped, Interrupted):
        sys.exit(INTERRUPTED)
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        sys.exit(DIVERGED)


def show(module: Task, batches: DataLoader[Any], folder: Path, settings: dict[str, Any]) -> list[str | Path]:
    """What the trained model does with some held-out examples; texts are printed.

    Args:
        folder: files go to its folder `shown`.
        settings: those of the group `task`.
    """
    if any(map(is_spread, module.parameters())):
        print("no samples: the model is spread over processes; unitscale inference reads its checkpoint")
        return []
    files = folder / "shown"
    files.mkdir(parents=True, exist_ok=True)
    module.eval()
    with torch.inference_mode():
        shown = module.show(batches, files, settings)
    if not any(files.iterdir()):
        files.rmdir()
    texts = [text for text in shown if isinstance(text, str)]
    print("".join(f"\n--- sample {number}\n{text}\n" for number, text in enumerate(texts, start=1)))
    if len(texts) < len(shown):
        print(f"to look at or listen to: {files}")
    return shown


# ----------------------------------------------------------------------------------------------------------------------
# Pre-training, of which other recipes make runs too


def check(cfg: DictConfig) -> None:
    """Raises InputError for settings that would fail late or obscurely."""
    check_numbers(cfg)
    check_data(cfg)
    width, head_width = cfg.model.get("width", 0), cfg.model.get("head_width", 1)
    if width % head_width:
        raise InputError(f"model.width={width} is not a multiple of model.head_width={head_width}; change one of them")
    check_known("model.initial", [cfg.model.get("initial", "own")], ("own", "fan_in"))
    task: type[Task] = get_class(cfg.task._target_)
    task.check(cfg)
    check_checkpoint(cfg)


def new_module(cfg: DictConfig, classes: Sequence[str] = ()) -> Task:
    """The module of this configuration, with fresh weights from the global seed.

    Args:
        cfg: of the recipe `pretrain`.
        classes: those that its head is to tell apart.
    """
    task: type[Task] = get_class(cfg.task._target_)
    module = task(
        model={**plain(cfg.model.config), **class_names(classes)},
        head=cfg.task.head,
        optimizer=plain(cfg.optimizer),
        schedule=plain(cfg.schedule),
        tokenizer=cfg.model.tokenizer,
    )
    if cfg.model.get("initial") == "fan_in":
        initialise_by_fan_in(module, depth=cfg.model.depth, branch_outputs=cfg.model.branch_outputs)
    return module


def module_and_data(cfg: DictConfig) -> tuple[Task, pl.LightningDataModule]:
    """The module of this configuration, with fresh weights from its seed, and the data that it is for."""
    task: type[Task] = get_class(cfg.task._target_)
    examples = instantiate(cfg.data[cfg.task.data])
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    module = new_module(cfg, task.classes(examples))
    fit_to_context(cfg, module.model)
    return module, task.data_module(examples, Pretrained(module.model, None, module.tokenizer, "", cfg.task.head), cfg)


def train(cfg: DictConfig, callbacks: Sequence[pl.Callback] = ()) -> pl.Trainer:
    """A run without its logs and report, for other recipes; its last held-out loss is `val/loss`."""
    module, data = module_and_data(cfg)
    trainer: pl.Trainer = instantiate(
        cfg.trainer,
        callbacks=[*callbacks, *([instantiate(cfg.unitscale)] if cfg.unitscale else [])],
        logger=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        _convert_="all",
    )
    trainer.fit(module, data)
    return trainer


def train_base(settings: Sequence[str], file: Path) -> float:
    """A model for other recipes to start from; writes its checkpoint and returns its held-out loss.

    Args:
        settings: overrides of `unitscale pretrain`.
        file: the checkpoint.

    Raises:
        SystemExit: training was stopped or diverged; what Ctrl-C stopped is kept beside `file`, to go on from.
    """
    cfg = hydra.compose("pretrain", overrides=list(settings))
    if debug := HydraConfig.initialized() and HydraConfig.get().runtime.choices.get("debug"):
        cfg.trainer = hydra.compose("pretrain", overrides=[f"debug={debug}"]).trainer  # no longer than the run itself
    check(cfg)
    unfinished = file.with_name(f"{file.stem}_unfinished.ckpt")
    try:
        trainer = train(cfg, [LastCheckpoint(unfinished), StopWhenDiverged(cfg.optimizer.lr)])
    except Interrupted:
        again = shlex.join(["unitscale", "pretrain", *settings, f"ckpt_path={unfinished}"])
        print(f"\nstopped; what was trained is kept. To finish it, and then to start from its checkpoint: {again}")
        sys.exit(INTERRUPTED)
    except Diverged as error:
        raise InputError(f"{file.stem}: {error}") from error
    trainer.save_checkpoint(file, weights_only=False)
    unfinished.unlink(missing_ok=True)
    return float(trainer.callback_metrics["val/loss"])
