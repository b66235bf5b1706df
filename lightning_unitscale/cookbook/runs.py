"""A training run: its model and data, its callbacks and trainer, and its end; what the training recipes share."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import hydra
import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Checkpoint, ProgressBar

from lightning_unitscale.cookbook.callbacks import Diverged, Interrupted, LastCheckpoint, Stopped, StopWhenDiverged
from lightning_unitscale.cookbook.checks import check_checkpoint, check_learning_rate, check_whole_numbers
from lightning_unitscale.cookbook.data import TokenText
from lightning_unitscale.cookbook.data.continuing_loader import loading
from lightning_unitscale.cookbook.tasks import LanguageModeling
from lightning_unitscale.cookbook.tokenizers import BYTES, byte_tokenizer
from lightning_unitscale.errors import InputError

AnyCallback = TypeVar("AnyCallback", bound=pl.Callback)

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
    trainer: pl.Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers, _convert_="all")
    return trainer


def callback_of(trainer: pl.Trainer, kind: type[AnyCallback]) -> AnyCallback:
    """The trainer's callback of this kind.

    Raises:
        InputError: the configuration has none.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
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


# ----------------------------------------------------------------------------------------------------------------------
# Pre-training, of which other recipes make runs too


def check(cfg: DictConfig) -> None:
    """Raises InputError for settings that would fail late or obscurely."""
    check_whole_numbers(
        cfg, "trainer.max_steps", "data.batch_size", "task.sequence_length", "model.width", "model.depth"
    )
    check_learning_rate(cfg)
    if cfg.model.width % cfg.model.head_width:
        raise InputError(
            f"model.width={cfg.model.width} is not a multiple of model.head_width={cfg.model.head_width}; "
            "change one of them"
        )
    prompt = len(str(cfg.task.sample.prompt).encode())
    if prompt > cfg.task.sequence_length - 2:
        raise InputError(f"task.sample.prompt has {prompt} bytes; there is room for {cfg.task.sequence_length - 2}")
    check_checkpoint(cfg)


def text_data(cfg: DictConfig) -> TokenText:
    """The text of this configuration, in bytes."""
    return TokenText(
        instantiate(cfg.data.documents),
        byte_tokenizer(),
        sequence_length=cfg.task.sequence_length,
        held_out=cfg.data.held_out,
        test_part=False,
        **loading(cfg),
    )


def new_module(cfg: DictConfig) -> LanguageModeling:
    """The module of this configuration, with fresh weights from the global seed."""
    return LanguageModeling(
        model=plain(cfg.model.config), optimizer=plain(cfg.optimizer), schedule=plain(cfg.schedule), tokenizer=BYTES
    )


def train(cfg: DictConfig, callbacks: Sequence[pl.Callback] = ()) -> pl.Trainer:
    """A run without its logs and report, for other recipes; its last held-out loss is `val/loss`."""
    data = text_data(cfg)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    module = new_module(cfg)
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
        sys.exit(130)
    except Diverged as diverged:
        raise InputError(f"{file.stem}: {diverged}") from diverged
    trainer.save_checkpoint(file, weights_only=False)
    unfinished.unlink(missing_ok=True)
    return float(trainer.callback_metrics["val/loss"])
