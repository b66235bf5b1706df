"""What a fine-tuning starts from: a model with weights from somewhere, its scaling, and the task around it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from lightning_unitscale.callback import UnitScaling
from lightning_unitscale.cookbook.arguments import keys_of
from lightning_unitscale.cookbook.heads import class_names, new_model
from lightning_unitscale.cookbook.model_path import load_pretrained
from lightning_unitscale.cookbook.pretrained import Pretrained
from lightning_unitscale.cookbook.runs import plain, train_base
from lightning_unitscale.cookbook.tasks import Task
from lightning_unitscale.cookbook.tasks.classification import numbers_of
from lightning_unitscale.cookbook.tokenizers import BYTES, check_tokenizer, load_tokenizer
from lightning_unitscale.cookbook.transformers_folder import save_for_transformers
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.plan.rename import plan_around
from lightning_unitscale.errors import InputError
from lightning_unitscale.in_force import forget, put_in_force


def starting_point(cfg: DictConfig, classes: Sequence[str], run_folder: Path) -> Pretrained:
    """The model of `ckpt_path` or `model.path`; else a base trained now, or `model.config` with random weights.

    Its `settings["base"]` says where the weights are from.

    Raises:
        InputError: its weights are kept in a format that can't be trained.
    """
    if cfg.ckpt_path:
        return _to_go_on(cfg, classes)
    path: str | Path | None = cfg.model.path
    if not path and cfg.model.base is not None:
        path = _new_base(cfg, run_folder)
    changes: dict[str, Any] = {**plain(cfg.model.changes), **({"num_labels": len(classes)} if classes else {})}
    if path:
        start = load_pretrained(str(path), cfg.task.head, cfg.model.tokenizer, **changes)
        if start.weights != "float32":
            raise InputError(
                f"model.path={path} has weights in {start.weights}, which are for inference and can't be trained; "
                "start from the checkpoint that they were exported from"
            )
    else:
        start = _with_random_weights(cfg, changes)
    if start.fresh:
        print(f"new, with random weights: {', '.join(start.fresh)}")
    if classes and set(numbers_of(start.model.config)) != set(classes):  # else the numbers that the head learned stay
        start.model.config.update(class_names(classes))
    if cfg.lora and (not path or Path(path).is_file()) and (start.plan is None or start.plan.is_plain):
        path = run_folder / "base"  # an adapter needs a base that plain transformers loads
        save_for_transformers(start.model, start.tokenizer, path)
    start.settings["base"] = str(Path(path).resolve() if path and Path(path).exists() else path or "")
    return start


def _new_base(cfg: DictConfig, run_folder: Path) -> Path:
    path = run_folder / "base.ckpt"
    print(f"No model.path: training a base first (unitscale pretrain {' '.join(cfg.model.base)})")
    loss = train_base(cfg.model.base, path)
    print(f"base: held-out loss {loss:.3f}; start from it again with model.path={path}")
    return path


def _with_random_weights(cfg: DictConfig, changes: dict[str, Any]) -> Pretrained:
    model = new_model({**plain(cfg.model.config), **changes}, cfg.task.head)
    tokenizer = load_tokenizer(cfg.model.tokenizer) if cfg.model.tokenizer else None
    if tokenizer is not None:
        check_tokenizer(tokenizer, model)
    return Pretrained(model, None, tokenizer, "", cfg.task.head)


def _to_go_on(cfg: DictConfig, classes: Sequence[str]) -> Pretrained:
    """The model of `ckpt_path`, with the settings that its run began with.

    Raises:
        InputError: it is of another recipe or task, or other settings are asked for.
    """
    start = load_pretrained(str(cfg.ckpt_path))
    if start.settings.get("head") != cfg.task.head or start.settings.get("base") is None:  # pre-training has no base
        raise InputError(
            f"ckpt_path={cfg.ckpt_path}: not of a run of unitscale finetune with {cfg.task.head}, so it can't go on as "
            "one; to begin one with its weights: model.path=…"
        )
    for key, asked, began in (
        ("lora", cfg.lora, start.settings["lora"]),
        ("model.freeze", cfg.model.freeze, start.settings["freeze"]),
    ):
        kept = {name: began.get(name) for name in asked} if isinstance(began, dict) else began
        if asked and plain(asked) != kept:
            raise InputError(
                f"ckpt_path={cfg.ckpt_path}: its run began with {key}={began or 'nothing'}, and goes on with it; leave "
                f"{key} out, or begin anew: model.path=…"
            )
    known = numbers_of(start.model.config)
    if classes and set(known) != set(classes):
        raise InputError(
            f"ckpt_path={cfg.ckpt_path}: it was trained for the classes {', '.join(known)}, and the data has "
            f"{', '.join(classes)}"
        )
    return start


def scaling_of(cfg: DictConfig, start: Pretrained) -> UnitScaling | None:
    """The callback: with the options of the checkpoint's own plan, if it goes on, else those of `unitscale`.

    It goes on unless `model.keep_plan=false`, LoRA or a `unitscale` of the command line that differs asks for another.
    """
    plan = start.plan
    anew = not cfg.model.keep_plan or cfg.lora or (not cfg.ckpt_path and _asks_for_another(cfg, plan))
    if plan is not None and not anew:
        print(f"The checkpoint's own parametrization goes on: {plan.scheme}, lr_units={plan.lr_units}")
        family = cfg.unitscale.optimizer_family if cfg.unitscale else None
        return UnitScaling(**plan.options, optimizer_family=family)
    if plan is not None:
        if not plan.is_plain:
            raise InputError(
                f"model.path={start.path} has unit-scaling factors in its forward pass, which "
                f"{'lora' if cfg.lora else 'another unitscale'} can't do without. Write plain weights first: "
                "unitscale export format=hf"
            )
        forget(start.model)
        start.plan = None
    if not cfg.unitscale:
        return None
    print(f"unit scaling: scheme={cfg.unitscale.scheme}, lr_units={cfg.unitscale.lr_units}")
    scaling: UnitScaling = instantiate(cfg.unitscale)
    return scaling


def _asks_for_another(cfg: DictConfig, plan: Plan | None) -> bool:
    """Whether the command line has settings of `unitscale` that are not the plan's."""
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    if plan is None or not any(key.partition(".")[0] == "unitscale" for key, _ in keys_of(given)):
        return False
    if not cfg.unitscale:
        return True
    scaling: UnitScaling = instantiate(cfg.unitscale)
    return scaling.unit_scaling.options.to_dict() != plan.options


def module_around(cfg: DictConfig, start: Pretrained) -> Task:
    """The task's LightningModule around the model, its scaling in force."""
    plan, model = start.plan, start.model
    if plan is not None:
        forget(model)
    freeze = start.settings["freeze"] if cfg.ckpt_path else plain(cfg.model.freeze)
    lora = start.settings["lora"] if cfg.ckpt_path else plain(cfg.lora)
    if lora and start.fresh:
        lora["modules_to_save"] = sorted({name.rpartition(".")[0] for name in start.fresh})
    task: type[Task] = get_class(cfg.task._target_)
    module = task(
        model=json.loads(model.config.to_json_string(use_diff=False)),
        head=start.head,
        optimizer=plain(cfg.optimizer),
        schedule=plain(cfg.schedule),
        tokenizer=(start.tokenizer.name_or_path or BYTES) if start.tokenizer is not None else None,
        freeze=freeze,
        lora=lora,
        base=start.settings["base"],
        weights=model.train(),
    )
    if plan is not None:
        put_in_force(module, plan_around(plan, "model"))
    return module
