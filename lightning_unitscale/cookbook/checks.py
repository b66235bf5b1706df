"""Checks of settings that would fail late or obscurely; each raises InputError with what to do."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel

from lightning_unitscale.checkpoint import read_checkpoint
from lightning_unitscale.cookbook.arguments import keys_of
from lightning_unitscale.cookbook.pretrained import context_length
from lightning_unitscale.cookbook.wrong_values import check_goes_on_with_its_model
from lightning_unitscale.errors import InputError
from lightning_unitscale.near_names import not_found
from lightning_unitscale.sharded_checkpoint import all_but_weights, file_beside_weights


def check_known(key: str, names: Iterable[str], known: Iterable[str]) -> None:
    """The names in the setting `key` are among the known ones."""
    choices = list(known)
    for name in names:
        if name not in choices:
            raise InputError(f"{key}: {name!r} is not known; choose from {', '.join(choices)}")


def check_data(cfg: DictConfig) -> None:
    """The data is of the kind that the task needs."""
    if cfg.task.data not in cfg.data:
        raise InputError(
            f"this task needs data with `{cfg.task.data}`, and what was chosen has {', '.join(map(str, cfg.data))}; "
            "choose task=… and data=… that fit, or an experiment"
        )


def fit_to_context(cfg: DictConfig, model: PreTrainedModel) -> None:
    """Makes `task.sequence_length` no longer than the model's context.

    Raises:
        InputError: it is longer, and was asked for in the command.
    """
    context, length = context_length(model), cfg.task.get("sequence_length", 0)
    if context is None or length <= context:
        return
    asked = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    if any(override.lstrip("+").startswith("task.sequence_length=") for override in asked):
        raise InputError(
            f"task.sequence_length={length} is longer than the model's context of {context} tokens; leave it out, or "
            f"give task.sequence_length={context}"
        )
    cfg.task.sequence_length = context
    print(f"task.sequence_length={context}, the model's context, in place of {length}")


def validate_before_the_end(cfg: DictConfig) -> None:
    """Training that would end before its first validation gets one at its end: no score, no best checkpoint."""
    interval, batches = cfg.trainer.val_check_interval, cfg.trainer.max_steps * cfg.trainer.accumulate_grad_batches
    if isinstance(interval, int) and interval > batches:
        cfg.trainer.val_check_interval = batches


def say_shorter_warm_up(cfg: DictConfig) -> None:
    """Prints how long the warm-up is where a number of steps that was asked for has made it shorter."""
    asked = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    steps, warm_up = cfg.trainer.max_steps, cfg.schedule.warmup_steps
    fitted = OmegaConf.is_interpolation(cfg.schedule, "warmup_steps") and warm_up == max(1, steps // 10)
    if fitted and "trainer.max_steps" in {key for key, _ in keys_of(asked)}:
        print(f"schedule.warmup_steps={warm_up}, at most a tenth of trainer.max_steps; another one is kept if given")


def check_checkpoint(cfg: DictConfig) -> None:
    """The one to continue from, if there is one, can be read."""
    if not cfg.ckpt_path:
        return
    path = Path(cfg.ckpt_path)
    if path.is_dir() and file_beside_weights(path).is_file():  # a part by each process
        all_but_weights(path)
        return
    if not path.is_file():
        raise InputError(f"ckpt_path={cfg.ckpt_path}: {not_found(path)}")
    asked = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    check_goes_on_with_its_model(cfg, {key for key, _ in keys_of(asked)})
    read_checkpoint(path)
