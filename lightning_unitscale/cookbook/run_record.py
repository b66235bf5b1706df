"""What a report says of a run beside its numbers: how it was started, on what, with what, when, and how it ended."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.monitor.run_folder import METRICS

PACKAGES = ("torch", "pytorch-lightning", "transformers", "lightning-unitscale")
# What may differ between a run and its untouched twin: scaling, and what is not training
BESIDE_TRAINING = ("unitscale", "monitor", "callbacks", "logger", "folder", "ckpt_path", "checkpoint_every")


def run_facts(cfg: DictConfig, trainer: pl.Trainer, data: str) -> dict[str, str]:
    """Name -> value, in the order in which the report shows them.

    Args:
        cfg: of the run.
        trainer: before it or after.
        data: what the run was trained on, in words.
    """
    hydra = HydraConfig.get()
    optimizer, warm_up = cfg.optimizer, cfg.schedule.warmup_steps
    length = cfg.task.get("sequence_length")
    per_step = cfg.data.get("batch_size", "?")
    many = [f"{per_step} examples" + (f" × {length} tokens" if length else "")]
    many += [f"{n} {what}" for n, what in _repeats(cfg, trainer) if n > 1]
    return {
        "command": shlex.join(["unitscale", str(hydra.job.config_name), *hydra.overrides.task]),
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "data": data,
        "batch": ", ".join(many),
        "optimizer": f"{optimizer._target_.rpartition('.')[2]}, peak learning rate {optimizer.lr:g}",
        "schedule": f"{warm_up} step{'' if warm_up == 1 else 's'} of warm-up, then linearly down to "
        f"{cfg.schedule.final:g} of the peak at step {cfg.schedule.decay_steps}",
        "seed": str(cfg.seed),
        "device": f"{trainer.num_devices} × {_device(trainer)}, precision {cfg.trainer.precision}",
        "versions": ", ".join(["Python " + platform.python_version(), *(f"{p} {version(p)}" for p in PACKAGES)]),
    }


def _repeats(cfg: DictConfig, trainer: pl.Trainer) -> list[tuple[int, str]]:
    return [(cfg.trainer.accumulate_grad_batches, "accumulated"), (trainer.world_size, "processes")]


def _device(trainer: pl.Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"{device.type} ({torch.get_num_threads()} of {os.cpu_count()} cores)" if device.type == "cpu" else device.type
    )


def in_words(plan: Plan | None) -> str:
    """What unit scaling did, in a sentence or two."""
    if plan is None:
        return "Without unit scaling: the model as it is."
    if plan.scheme == "preserve" and not plan.cast_sites:
        return "The model's own function and training were left as they are (scheme preserve)."
    folded = (
        "All of it is folded into the stored weights, so the model is a plain one"
        if not plan.explicit_sites
        else f"{len(plan.explicit_sites)} factors stay in the forward pass"
    )
    left = sum(bool(parameter.reason) for parameter in plan.parameters.values())
    casts = f" Operands of {len(plan.cast_sites)} sites were cast to a narrow format." if plan.cast_sites else ""
    return (
        f"Unit scaling ({plan.scheme}) gave {len(plan.parameters) - left} of {len(plan.parameters)} parameters their "
        f"initial scale and learning-rate multiplier, so that activations start with a root mean square near 1. "
        f"{folded}.{casts}"
    )


def run_before(ckpt_path: str | None) -> Path | None:
    """The folder of the run whose checkpoint this is, two levels above it."""
    folders = Path(ckpt_path).expanduser().resolve().parents if ckpt_path else []
    return folders[1] if len(folders) > 1 and (folders[1] / ".hydra").is_dir() else None


def untouched_twin(folder: Path) -> Path | None:
    """The newest run beside this one that was trained with the same settings without unit scaling, if there is one."""
    own = _settings(folder)
    if own is None or not own.pop("unitscale", None):
        return None
    for other in sorted(folder.resolve().parent.glob("*/.hydra/config.yaml"), reverse=True):
        twin = other.parents[1]
        settings = _settings(twin)
        finished = (twin / "report" / METRICS).is_file()
        if finished and settings is not None and not settings.pop("unitscale", None) and settings == own:
            return twin
    return None


def _settings(folder: Path) -> dict[str, Any] | None:
    file = folder / ".hydra" / "config.yaml"
    if not file.is_file():
        return None
    found: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    if not isinstance(found, Mapping):
        return None
    return {key: value for key, value in found.items() if key == "unitscale" or key not in BESIDE_TRAINING}
