"""The run that made a model: what its folder records, and which task and held-out data follow from it."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from lightning_unitscale.cookbook.config import shipped
from lightning_unitscale.cookbook.heads import CAUSAL_LM, TASK_HEADS
from lightning_unitscale.cookbook.pretrained import Pretrained, context_length
from lightning_unitscale.cookbook.tasks import Task, TextGeneration
from lightning_unitscale.cookbook.tokenizers import is_of_bytes
from lightning_unitscale.errors import InputError
from lightning_unitscale.sharded_checkpoint import is_in_shards


def recorded_run(path: str) -> DictConfig | None:
    """What Hydra noted in the folder of the run, two levels above its checkpoints and one above its other models."""
    record = _record(path) / "config.yaml"
    if not record.is_file():
        return None
    run = OmegaConf.load(record)
    if not isinstance(run, DictConfig) or not {"task", "data", "trainer"} <= run.keys():
        return None
    if "_target_" not in run.task:  # of a `unitscale pretrain` before it shared its module with `finetune`
        run.task = OmegaConf.merge(_option_of_task("language_modeling"), {"test_part": False}, run.task)
    return run


def _record(path: str) -> Path:
    where = Path(path).expanduser().resolve()
    return (where.parents[1] if where.is_file() or is_in_shards(where) else where.parent) / ".hydra"


def debug_of(path: str) -> str | None:
    """The option of the group debug that the model's run had; None for one that was meant."""
    record = _record(path) / "hydra.yaml"
    return OmegaConf.select(OmegaConf.load(record), "hydra.runtime.choices.debug") if record.is_file() else None


def recorded_task(path: str) -> type[Task] | None:
    """The class of the task that the model's run names; its file may also tell transformers of an architecture."""
    run = recorded_run(path)
    return _importable(run.task._target_) if run is not None else None


def task_of(found: Pretrained) -> type[Task]:
    """The class of the task that the model's run names or, where none is recorded, of the one for its head."""
    task: type[Task] | None = recorded_task(found.path)
    if task is None or found.head not in (task.heads or (found.head,)):
        fallback = TextGeneration if found.model.can_generate() else Task
        option = TASK_HEADS.get(found.head)
        task = resolve_name(_option_of_task(option)._target_) if option else fallback
    return task


def asked_task(found: Pretrained, task: DictConfig | None) -> type[Task]:
    """The class of the task that was asked for or, where none was, of the one that the model is for."""
    return task_of(found) if task is None else _importable(task._target_)


def run_to_measure(found: Pretrained, task: DictConfig | None, data: DictConfig | None, **sizes: Any) -> DictConfig:
    """The configuration of the run that made the model, with this task, data and sizes in place of its own.

    Args:
        found: the model.
        task: of the group `task`; None: that of the run.
        data: likewise.
        sizes: batch_size, and sequence_length, None for that of training.

    Raises:
        InputError: there is no record of such a run, and nothing else says what to measure the model on; or the task
            is for another head, or what the record names is no longer there.
    """
    run = recorded_run(found.path)
    if run is None:
        run = _default_run(found, task)
        if data is None and found.head != CAUSAL_LM:
            raise InputError(
                f"nothing beside model.path={found.path} records what it was trained on; name it with data=…"
            )
    OmegaConf.set_struct(run, False)
    run.task = run.task if task is None else task
    run.data = run.data if data is None else data
    run.data.batch_size = sizes["batch_size"]
    context, asked = context_length(found.model), sizes["sequence_length"]
    if asked is not None:
        run.task.sequence_length = asked
    if context is not None and run.task.get("sequence_length", 0) > context:
        if asked is not None:
            raise InputError(f"sequence_length={asked} is longer than the model's context, {context}")
        run.task.sequence_length = context
    _check(run, found)
    return run


def _check(run: DictConfig, found: Pretrained) -> None:
    if run.task.head != found.head:
        raise InputError(
            f"the task is for {run.task.head}, but the model's head is {found.head}; give another with task=…"
        )
    if run.task.data not in run.data:
        raise InputError(
            f"the task needs data with `{run.task.data}`, which this data has not; name others with data=…"
        )
    for group, node in (("task", run.task), ("data", run.data[run.task.data])):
        if _importable(node._target_) is None:
            choice = f"{group}={_choice(found.path, group)}"
            raise InputError(
                f"the run of model.path={found.path} had {choice}, whose {node._target_} can't be imported any more; "
                f"choose it again, with its settings: {choice}"
            )


def _default_run(found: Pretrained, task: DictConfig | None) -> DictConfig:
    """For a model without a record: of bytes, what `unitscale pretrain` holds out; else documentation in windows."""
    of_bytes = found.tokenizer is not None and is_of_bytes(found.tokenizer)
    if found.head == CAUSAL_LM and of_bytes:
        return hydra.compose("pretrain")
    if found.head in TASK_HEADS or task is not None:
        option = TASK_HEADS.get(found.head, "any_head")
        return hydra.compose("finetune", [f"task={option}", "data=topics"])
    raise InputError(f"mode=evaluate knows no task for {found.head}; it knows {', '.join(TASK_HEADS)}")


def _choice(path: str, group: str) -> str:
    """The option of a group that the run was started with."""
    record = _record(path) / "hydra.yaml"
    choice = OmegaConf.select(OmegaConf.load(record), f"hydra.runtime.choices.{group}") if record.is_file() else None
    return str(choice or "…")


def _option_of_task(name: str) -> Any:
    return OmegaConf.load(shipped("conf") / "task" / f"{name}.yaml")


def _importable(target: str) -> Any:
    try:
        return resolve_name(target)
    except (ImportError, AttributeError, ValueError):
        return None
