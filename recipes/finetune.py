"""Fine-tune a pretrained model: all of it, a part of its layers, or LoRA adapters.

    unitscale finetune                                       # = python recipes/finetune.py: from documentation to code
    unitscale finetune model.path=outputs/pretrain/…/last.ckpt   # a checkpoint, a folder or a hub name to start from
    unitscale finetune experiment=text_classification        # also: digits, seq2seq, code
    unitscale finetune experiment=text_classification data=labelled_file data.path=reviews.csv model.path=my-bert
    unitscale finetune lora=all_linear                       # adapters, saved in peft's format
    unitscale finetune 'model.freeze=[model.embed_tokens,model.layers.0]'
    unitscale finetune task=any_head task.head=AutoModelForTokenClassification data=module data.module._target_=…
    unitscale finetune ckpt_path=outputs/finetune/…/last.ckpt    # goes on exactly, with the settings it began with

The model is left as it is (scheme preserve), or goes on in its own parametrization where its checkpoint has one; with
LoRA or another head the checkpoint's weights are taken as those of an ordinary model. The best checkpoint by held-out
score is kept, tested, and written as a folder for plain transformers.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from pretrain import Progress
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor

from lightning_unitscale import UnitScaling, remove_unit_scaling
from lightning_unitscale.checkpoint import read_checkpoint
from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.continuation import BestCheckpoint, RandomNumbers
from lightning_unitscale.cookbook.data.batches import ImageBatch, PairBatch, TextBatch
from lightning_unitscale.cookbook.data.examples import Examples, split_by
from lightning_unitscale.cookbook.data.token_text import TokenText
from lightning_unitscale.cookbook.interrupt import Interrupted, LastCheckpoint
from lightning_unitscale.cookbook.pretrained import (
    BYTES,
    Pretrained,
    check_tokenizer,
    load_pretrained,
    load_tokenizer,
    new_model,
)
from lightning_unitscale.cookbook.runs import train_base
from lightning_unitscale.cookbook.tasks import FineTuning
from lightning_unitscale.engine.plan.rename import plan_around
from lightning_unitscale.errors import InputError, UnitScalingError
from lightning_unitscale.monitor.report import write_report
from lightning_unitscale.prepare import forget, put_in_force

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
    data = new_data(cfg, start, examples)
    unitscale = scaling_of(cfg, start)
    monitor = instantiate(cfg.monitor) if cfg.monitor else None
    module = new_module(cfg, start)

    best = BestCheckpoint(
        run_folder / "checkpoints",
        filename="best",
        monitor=cfg.task.monitor,
        mode=cfg.task.mode,
        enable_version_counter=False,
    )
    last = LastCheckpoint(run_folder / "checkpoints" / "last.ckpt")
    callbacks = [
        *([unitscale] if unitscale else []),
        *([monitor] if monitor else []),
        best,
        EarlyStopping(cfg.task.monitor, mode=cfg.task.mode, patience=cfg.patience),
        LearningRateMonitor(logging_interval="step"),
        RandomNumbers(),
        last,
        *([Progress(leave=True)] if cfg.trainer.enable_progress_bar else []),
    ]
    loggers = [instantiate(logger) for logger in cfg.logger.values()]
    trainer: pl.Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers, _convert_="all")

    before = trainer.test(module, data, verbose=False)[0] if cfg.test_before and not cfg.ckpt_path else {}
    with suppress(Interrupted):
        trainer.fit(module, data, ckpt_path=cfg.ckpt_path)
    metrics = {f"{name}, before": value for name, value in before.items()}
    if not last.interrupted:
        metrics.update(trainer.test(module, data, ckpt_path=best.best_model_path, verbose=False)[0])
    if best.best_model_score is not None:  # always, but for an interrupt before the first validation
        metrics[f"best {cfg.task.monitor}"] = float(best.best_model_score)
    if trainer.is_global_zero:
        metrics["seconds"] = round(time.perf_counter() - begin, 1)
        report(cfg, run_folder, trainer, metrics, unitscale)
    if last.interrupted:
        print(f"stopped at step {trainer.global_step}; continue with the same settings and ckpt_path={last.path}")
        sys.exit(130)
    if trainer.is_global_zero:
        print(f"best checkpoint {best.best_model_path}")
        for line in export(module, run_folder):
            print(line)
    return metrics[f"best {cfg.task.monitor}"]


def report(
    cfg: DictConfig, folder: Path, trainer: pl.Trainer, metrics: Mapping[str, float], unitscale: UnitScaling | None
) -> None:
    """Prints the numbers and writes the page."""
    parameters = list(trainer.lightning_module.parameters())
    numbers = {
        **metrics,
        "parameters": sum(p.numel() for p in parameters),
        "parameters trained": sum(p.numel() for p in parameters if p.requires_grad),
        "steps": trainer.global_step,
    }
    page = write_report(
        folder,
        title=f"finetune: {cfg.model.path or 'a model made in this run'}",
        metrics=numbers,
        plan=unitscale.plan.summary() if unitscale and unitscale.plan else "no unit scaling",
    )
    print("\n" + "\n".join(f"{name:40} {value:>12,.6g}" for name, value in numbers.items()))
    print(f"\nreport {page}")


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
    heads = getattr(get_class(cfg.task._target_), "heads", None)
    if heads and cfg.task.head not in heads:
        raise InputError(
            f"task.head={cfg.task.head} does not go with {cfg.task._target_}, which is for {' and '.join(heads)}; any "
            "other head is trained with task=any_head and data=module"
        )
    check_interval(cfg)
    if not any((cfg.model.path, cfg.model.base, cfg.model.config)):
        raise InputError("there is no model to start from; give one: model.path=<checkpoint, folder or hub name>")
    if cfg.ckpt_path and not Path(cfg.ckpt_path).is_file():
        raise InputError(f"ckpt_path={cfg.ckpt_path}: no such file (looked in {Path.cwd()})")
    if cfg.ckpt_path:
        read_checkpoint(cfg.ckpt_path)


# ----------------------------------------------------------------------------------------------------------------------
# What it starts from


def check_interval(cfg: DictConfig) -> None:
    """Raises InputError for a training that ends before its first validation."""
    interval, batches = cfg.trainer.val_check_interval, cfg.trainer.max_steps * cfg.trainer.accumulate_grad_batches
    if isinstance(interval, int) and interval > batches:
        raise InputError(
            f"trainer.val_check_interval={interval} is more than the {batches} batches of training, so there would be "
            "no score to choose a checkpoint by; make it smaller"
        )


def starting_point(cfg: DictConfig, labels: Sequence[str], run_folder: Path) -> Pretrained:
    """The model of `ckpt_path` or `model.path`; else a base trained now, or `model.config` with random weights.

    Its `settings["base"]` says where the weights are from.
    """
    if cfg.ckpt_path:
        return to_go_on(cfg, labels)
    changes: Any = OmegaConf.to_container(cfg.model.changes, resolve=True)
    if labels:
        changes["num_labels"] = len(labels)
    path, tokenizer = cfg.model.path, cfg.model.tokenizer
    if path:
        start = load_pretrained(str(path), cfg.task.head, tokenizer, **changes)
    elif cfg.model.base is not None:
        path = run_folder / "base.ckpt"
        print(f"No model.path: training a base first (unitscale pretrain {' '.join(cfg.model.base)})")
        loss = train_base(cfg.model.base, path)
        print(f"base: held-out loss {loss:.3f}; start from it again with model.path={path}")
        start = load_pretrained(str(path), cfg.task.head, tokenizer, **changes)
    else:
        config: Any = OmegaConf.to_container(cfg.model.config, resolve=True)
        model = new_model({**config, **changes}, cfg.task.head)
        start = Pretrained(model, None, load_tokenizer(tokenizer) if tokenizer else None, "", cfg.task.head)
        if start.tokenizer is not None:
            check_tokenizer(start.tokenizer, model)
    if start.fresh:
        print(f"new, with random weights: {', '.join(start.fresh)}")
    if labels and set(numbers_of(start.model.config)) != set(labels):  # else the numbers that the head has learned stay
        start.model.config.id2label = dict(enumerate(labels))
        start.model.config.label2id = {label: number for number, label in enumerate(labels)}
    if cfg.lora and (not path or Path(path).is_file()) and (start.plan is None or start.plan.is_plain):
        path = run_folder / "base"  # an adapter needs a base that plain transformers loads
        save_for_transformers(start.model, start.tokenizer, path)
    start.settings["base"] = str(Path(path).resolve() if path and Path(path).exists() else path or "")
    return start


def to_go_on(cfg: DictConfig, labels: Sequence[str]) -> Pretrained:
    """The model of `ckpt_path`, with the settings that its run began with.

    Raises:
        InputError: it is of another recipe or task, or other settings are asked for.
    """
    start = load_pretrained(str(cfg.ckpt_path))
    if start.settings.get("head") != cfg.task.head:
        raise InputError(
            f"ckpt_path={cfg.ckpt_path}: not of a run of unitscale finetune with {cfg.task.head}, so it can't go on as "
            "one; to begin one with its weights: model.path=…"
        )
    for key, asked, began in (
        ("lora", cfg.lora, start.settings["lora"]),
        ("model.freeze", cfg.model.freeze, start.settings["freeze"]),
    ):
        kept = {name: began.get(name) for name in asked} if isinstance(began, dict) else began
        if asked and OmegaConf.to_container(asked, resolve=True) != kept:
            raise InputError(
                f"ckpt_path={cfg.ckpt_path}: its run began with {key}={began or 'nothing'}, and goes on with it; leave "
                f"{key} out, or begin anew: model.path=…"
            )
    known = numbers_of(start.model.config)
    if labels and set(known) != set(labels):
        raise InputError(
            f"ckpt_path={cfg.ckpt_path}: it was trained for the classes {', '.join(known)}, and the data has "
            f"{', '.join(labels)}"
        )
    return start


def numbers_of(config: Any) -> dict[str, int]:
    """Class -> its place in the head."""
    return {label: number for number, label in config.id2label.items()}


def scaling_of(cfg: DictConfig, start: Pretrained) -> UnitScaling | None:
    """The callback: with the options of the checkpoint's own plan, if it goes on, else those of `unitscale`."""
    plan = start.plan
    if plan is None:
        return of_settings(cfg)
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
    return of_settings(cfg)


def of_settings(cfg: DictConfig) -> UnitScaling | None:
    """The callback that `unitscale` describes."""
    if not cfg.unitscale:
        return None
    print(f"unit scaling: scheme={cfg.unitscale.scheme}, lr_units={cfg.unitscale.lr_units}")
    scaling: UnitScaling = instantiate(cfg.unitscale)
    return scaling


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
            ("freeze", start.settings["freeze"] if cfg.ckpt_path else cfg.model.freeze),
            ("lora", start.settings["lora"] if cfg.ckpt_path else cfg.lora),
        )
    }
    if settings["lora"] and start.fresh:
        settings["lora"]["modules_to_save"] = sorted({name.rpartition(".")[0] for name in start.fresh})
    task: type[FineTuning] = get_class(cfg.task._target_)
    module = task(
        model=json.loads(model.config.to_json_string(use_diff=False)),
        head=start.head,
        tokenizer=(start.tokenizer.name_or_path or BYTES) if start.tokenizer is not None else None,
        base=start.settings["base"],
        weights=model.train(),
        **settings,
    )
    if plan is not None:
        put_in_force(module, plan_around(plan, "model"))
    return module


# ----------------------------------------------------------------------------------------------------------------------
# Data


def new_data(cfg: DictConfig, start: Pretrained, examples: Any) -> pl.LightningDataModule:
    """Batches that fit the task and the model."""
    if cfg.task.data == "module":
        data: pl.LightningDataModule = examples
        return data
    steps = cfg.trainer.max_steps * cfg.trainer.accumulate_grad_batches
    options = {"batch_size": cfg.data.batch_size, "workers": cfg.data.workers, "steps": steps, "seed": cfg.seed}
    config, share = start.model.config, cfg.data.held_out
    numbers = numbers_of(config)
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
    model: Any = module.model
    lines = []
    if module.hparams.lora:  # type: ignore[attr-defined]
        model.save_pretrained(str(folder / "adapter"))
        model.get_base_model().config.save_pretrained(str(folder / "adapter"))  # knows the classes
        lines.append(f"adapter for peft {folder / 'adapter'}")
        model = model.merge_and_unload()
    else:
        try:
            remove_unit_scaling(module)
        except UnitScalingError as error:
            if "is not unit-scaled" not in str(error):
                return [f"no folder for transformers ({error}) Use unitscale export format=hf."]
    save_for_transformers(model, module.tokenizer, folder / "model")
    return [*lines, f"for transformers {folder / 'model'}"]


def save_for_transformers(model: Any, tokenizer: Any, folder: Path) -> None:
    """Weights, config and tokenizer, as `from_pretrained` reads them."""
    model.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
