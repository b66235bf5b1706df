"""Fine-tune a pretrained model: all of it, a part of its layers, or LoRA adapters.

    unitscale finetune                                       # = python recipes/finetune.py: from documentation to code
    unitscale finetune model.path=outputs/pretrain/…/last.ckpt   # a checkpoint, a folder or a hub name to start from
    unitscale finetune experiment=text_classification        # also: digits, seq2seq, code
    unitscale finetune experiment=text_classification data=labelled_file data.path=reviews.csv model.path=my-bert
    unitscale finetune lora=all_linear                       # adapters, saved in peft's format
    unitscale finetune 'model.freeze=[model.embed_tokens,model.layers.0]'

The model is left as it is (scheme preserve), or goes on in its own parametrization where its checkpoint has one. The
best checkpoint by held-out score is kept, tested, and written as a folder for plain transformers.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from pretrain import Progress, train_base
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

from lightning_unitscale import UnitScaling, remove_unit_scaling
from lightning_unitscale.cli import recipe
from lightning_unitscale.data.batches import ImageBatch, PairBatch, TextBatch
from lightning_unitscale.data.examples import Examples, split_by
from lightning_unitscale.data.token_text import TokenText
from lightning_unitscale.engine.nesting import plan_around
from lightning_unitscale.engine.prepare import forget, put_in_force
from lightning_unitscale.errors import InputError
from lightning_unitscale.interrupt import SaveOnInterrupt
from lightning_unitscale.options import UnitScalingError
from lightning_unitscale.pretrained import (
    BYTES,
    Pretrained,
    check_tokenizer,
    load_pretrained,
    load_tokenizer,
    new_model,
)
from lightning_unitscale.report import write_report
from lightning_unitscale.tasks import FineTuning

# ----------------------------------------------------------------------------------------------------------------------
# The run


@recipe("finetune")
def main(cfg: DictConfig) -> float:
    """Trains, keeps the best checkpoint, tests and exports it; returns the monitored score (what a sweep optimizes)."""
    begin = time.perf_counter()
    run_folder = Path(HydraConfig.get().runtime.output_dir)

    check(cfg)
    examples = instantiate(cfg.data[cfg.task.data])
    labels = sorted({example.label for example in examples}) if cfg.task.data in ("labelled", "images") else []
    pl.seed_everything(cfg.seed, workers=True)
    start = starting_point(cfg, labels, run_folder)
    data = new_data(cfg, start, examples, labels)
    unitscale = scaling_of(cfg, start)
    monitor = instantiate(cfg.monitor) if cfg.monitor else None
    module = new_module(cfg, start)

    best = ModelCheckpoint(
        run_folder / "checkpoints",
        filename="best",
        monitor=cfg.task.monitor,
        mode=cfg.task.mode,
        save_last=True,
        enable_version_counter=False,
    )
    interrupt = SaveOnInterrupt(run_folder / "checkpoints" / "last.ckpt")
    callbacks = [
        *([unitscale] if unitscale else []),
        *([monitor] if monitor else []),
        best,
        EarlyStopping(cfg.task.monitor, mode=cfg.task.mode, patience=cfg.patience),
        LearningRateMonitor(logging_interval="step"),
        interrupt,
        *([Progress(leave=True)] if cfg.trainer.enable_progress_bar else []),
    ]
    loggers = [instantiate(logger) for logger in cfg.logger.values()]
    trainer: pl.Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers, _convert_="all")

    before = trainer.test(module, data, verbose=False)[0] if cfg.test_before and not cfg.ckpt_path else {}
    trainer.fit(module, data, ckpt_path=cfg.ckpt_path)
    if interrupt.interrupted:
        print(f"\nStopped at step {trainer.global_step}. Continue with: ckpt_path={interrupt.path}")
        sys.exit(130)
    after = trainer.test(module, data, ckpt_path=best.best_model_path, verbose=False)[0]
    score = float(best.best_model_score)  # type: ignore[arg-type]  # the run has validated
    if not trainer.is_global_zero:
        return score

    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    metrics = {
        **{f"{name}, before": value for name, value in before.items()},
        **after,
        f"best {cfg.task.monitor}": score,
        "parameters": sum(p.numel() for p in module.parameters()),
        "parameters trained": trained,
        "steps": trainer.global_step,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    page = write_report(
        run_folder,
        title=f"finetune: {cfg.model.path or 'a model made in this run'}",
        metrics=metrics,
        plan=unitscale.plan.summary() if unitscale and unitscale.plan else "no unit scaling",
    )
    print("\n" + "\n".join(f"{name:40} {value:>12,.6g}" for name, value in metrics.items()))
    print(f"\nreport {page}")
    print(f"best checkpoint {best.best_model_path}")
    for line in export(module, run_folder):
        print(line)
    return score


def check(cfg: DictConfig) -> None:
    """Raises InputError for settings that would fail late or obscurely."""
    for key in ("trainer.max_steps", "data.batch_size", "task.sequence_length", "patience"):
        value = OmegaConf.select(cfg, key, default=1)  # images have no length
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{key}={value} must be a positive whole number")
    if not isinstance(cfg.optimizer.lr, (int, float)) or cfg.optimizer.lr <= 0:
        raise InputError(f"optimizer.lr={cfg.optimizer.lr} must be a positive number")
    if cfg.task.data not in cfg.data:
        raise InputError(
            f"this task needs data with `{cfg.task.data}`, and what was chosen has {', '.join(map(str, cfg.data))}; "
            "choose task=… and data=… that fit, or an experiment"
        )
    if not any((cfg.model.path, cfg.model.base, cfg.model.config)):
        raise InputError("there is no model to start from; give one: model.path=<checkpoint, folder or hub name>")
    if cfg.ckpt_path and not Path(cfg.ckpt_path).is_file():
        raise InputError(f"ckpt_path={cfg.ckpt_path}: no such file (looked in {Path.cwd()})")


# ----------------------------------------------------------------------------------------------------------------------
# What it starts from


def starting_point(cfg: DictConfig, labels: Sequence[str], run_folder: Path) -> Pretrained:
    """The model of `model.path`; without one, a base trained now, or `model.config` with random weights."""
    changes: Any = OmegaConf.to_container(cfg.model.changes, resolve=True)
    if labels:
        changes["id2label"] = dict(enumerate(labels))
        changes["label2id"] = {label: number for number, label in enumerate(labels)}
    path, tokenizer = cfg.model.path, cfg.model.tokenizer
    if path:
        start = load_pretrained(str(path), cfg.task.head, tokenizer, **changes)
    elif cfg.model.base is not None:
        file = run_folder / "base.ckpt"
        print(f"No model.path: training a base first (unitscale pretrain {' '.join(cfg.model.base)})")
        loss = train_base(cfg.model.base, file)
        print(f"base: held-out loss {loss:.3f}; start from it again with model.path={file}")
        start = load_pretrained(str(file), cfg.task.head, tokenizer, **changes)
    else:
        config: Any = OmegaConf.to_container(cfg.model.config, resolve=True)
        model = new_model({**config, **changes}, cfg.task.head)
        start = Pretrained(model, None, load_tokenizer(tokenizer) if tokenizer else None, "", cfg.task.head)
        if start.tokenizer is not None:
            check_tokenizer(start.tokenizer, model)
    if start.fresh:
        print(f"new, with random weights: {', '.join(start.fresh)}")
    start.model.name_or_path = str(path or run_folder / "base.ckpt")  # where an adapter will look for it
    return start


def scaling_of(cfg: DictConfig, start: Pretrained) -> UnitScaling | None:
    """The callback: with the options of the checkpoint's own plan, if it goes on, else those of `unitscale`."""
    plan = start.plan
    if plan is None:
        return instantiate(cfg.unitscale) if cfg.unitscale else None
    if cfg.model.keep_plan and not cfg.lora:
        print(f"The checkpoint's own parametrization goes on: {plan.scheme}, lr_units={plan.lr_units}")
        family = cfg.unitscale.optimizer_family if cfg.unitscale else None
        return UnitScaling(**plan.options, optimizer_family=family)
    if not plan.is_plain:
        raise InputError(
            f"model.path={start.path} has unit-scaling factors in its forward pass, which "
            f"{'lora' if cfg.lora else 'model.keep_plan=false'} can't do without. Write plain weights first: "
            "unitscale export format=hf"
        )
    forget(start.model)
    start.plan = None
    return instantiate(cfg.unitscale) if cfg.unitscale else None


def new_module(cfg: DictConfig, start: Pretrained) -> FineTuning:
    """The task's LightningModule around the model, its scaling in force."""
    plan, model = start.plan, start.model
    if plan is not None:
        forget(model)
    settings: dict[str, Any] = {
        key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for key, value in (
            ("optimizer", cfg.optimizer),
            ("schedule", cfg.schedule),
            ("freeze", cfg.model.freeze),
            ("lora", cfg.lora),
        )
    }
    if settings["lora"] and start.fresh:
        settings["lora"]["modules_to_save"] = sorted({name.rpartition(".")[0] for name in start.fresh})
    task: type[FineTuning] = get_class(cfg.task._target_)
    module = task(
        model=json.loads(model.config.to_json_string(use_diff=False)),
        head=start.head,
        tokenizer=(start.tokenizer.name_or_path or BYTES) if start.tokenizer is not None else None,
        weights=model.train(),
        **settings,
    )
    if plan is not None:
        put_in_force(module, plan_around(plan, "model"))
    return module


# ----------------------------------------------------------------------------------------------------------------------
# Data


def new_data(cfg: DictConfig, start: Pretrained, examples: Any, labels: Sequence[str]) -> pl.LightningDataModule:
    """Batches that fit the task and the model."""
    steps = cfg.trainer.max_steps * cfg.trainer.accumulate_grad_batches
    options = {"batch_size": cfg.data.batch_size, "workers": cfg.data.workers, "steps": steps, "seed": cfg.seed}
    config, share = start.model.config, cfg.data.held_out
    numbers = {label: number for number, label in enumerate(labels)}
    if cfg.task.data == "images":
        size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
        parts = split_by(lambda image: image.group, examples, share, lambda image: image.label)
        return Examples(parts, ImageBatch(numbers, config.num_channels, tuple(size)), **options)

    tokenizer, length = start.tokenizer, cfg.task.sequence_length
    if tokenizer is None:
        raise InputError(f"model.path={start.path} has no tokenizer beside it; name one: model.tokenizer=<path>")
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and length > context:
        raise InputError(f"task.sequence_length={length} is longer than the model's context of {context} tokens")
    if cfg.task.data == "documents":
        return TokenText(examples, tokenizer, sequence_length=length, held_out=share, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id  # where a causal model's text ends
    if cfg.task.data == "labelled":
        parts = split_by(lambda example: example.group, examples, share, lambda example: example.label)
        return Examples(parts, TextBatch(tokenizer, numbers, length), **options)
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no eos token, so a generated text would never end; give another one")
    return Examples(split_by(lambda pair: pair.source, examples, share), PairBatch(tokenizer, length), **options)


# ----------------------------------------------------------------------------------------------------------------------
# What it leaves


def export(module: FineTuning, folder: Path) -> list[str]:
    """Writes the adapter, if there is one, and the model as plain transformers loads it; returns what to print."""
    lines, model = [], module.model
    if module.hparams.lora:  # type: ignore[attr-defined]
        model.save_pretrained(str(folder / "adapter"))
        lines.append(f"adapter for peft {folder / 'adapter'}")
        model = model.merge_and_unload()
    else:
        try:
            remove_unit_scaling(module)
        except UnitScalingError as error:
            if "is not unit-scaled" not in str(error):
                return [f"no folder for transformers ({error}) Use unitscale export format=hf."]
    model.save_pretrained(str(folder / "model"))
    if module.tokenizer is not None:
        module.tokenizer.save_pretrained(folder / "model")
    return [*lines, f"for transformers {folder / 'model'}"]


if __name__ == "__main__":
    main()
