"""mode=evaluate: the scores that validation logs, on what a run held out, with weights in any format."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pkgutil import resolve_name
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from lightning_unitscale.cookbook.data import Batch
from lightning_unitscale.cookbook.inference.loading import load, weight_formats
from lightning_unitscale.cookbook.inference.numbers import print_numbers
from lightning_unitscale.cookbook.inference.recorded_run import run_to_measure
from lightning_unitscale.cookbook.pretrained import Pretrained
from lightning_unitscale.cookbook.tasks import Task
from lightning_unitscale.export.fp8_weights import stored_bytes


def compare_formats(cfg: DictConfig, path: str) -> dict[str, dict[str, float]]:
    """Size, held-out scores and speed with weights in each format."""
    sizes, scores, speeds, unit = {}, {}, {}, ""
    for weights in weight_formats(cfg):
        found = load(cfg, path, weights)
        module, batches = held_out(cfg, found)
        begin = time.perf_counter()
        values, count = held_out_scores(module, batches, test=cfg.part == "test")
        unit = f"{module.counted}/s"
        sizes[found.weights] = stored_bytes(found.model) / 2**20
        speeds[found.weights] = count / (time.perf_counter() - begin)
        scores[found.weights] = values
    names = list(next(iter(scores.values())))
    print(f"{'weights':10} {'MiB':>8} {' '.join(f'{name:>12}' for name in names)} {unit:>10}")
    for weights, values in scores.items():
        shown = " ".join(f"{values[name]:12.5f}" for name in names)
        print(f"{weights:10} {sizes[weights]:8.2f} {shown} {speeds[weights]:10,.0f}")
    slower = [name for name in speeds if name != "float32" and speeds[name] < 1.05 * speeds.get("float32", 0)]
    if slower:
        print(f"\n{' and '.join(slower)}: no faster than float32 on this machine; they save memory alone")
    print()
    print_numbers()
    return scores


def held_out(cfg: DictConfig, found: Pretrained) -> tuple[Task, DataLoader[Any]]:
    """The task around the model, and the batches that its run held out."""
    sizes = {"batch_size": cfg.batch_size, "sequence_length": cfg.sequence_length}
    run = run_to_measure(found, cfg.get("task"), cfg.get("data"), **sizes)
    task: type[Task] = resolve_name(run.task._target_)
    data: Any = task.data_module(instantiate(run.data[run.task.data]), found, run)
    return around(task, found), data.val_dataloader() if cfg.part == "validation" else data.test_dataloader()


def around(task: type[Task], found: Pretrained) -> Task:
    """The task with a model that is there already."""
    module = task(model=found.model.config.to_dict(), head=found.head, weights=found.model)
    module.tokenizer = found.tokenizer
    return module.to(found.model.device)


@torch.inference_mode()
def held_out_scores(module: Task, batches: Iterable[Batch], test: bool = False) -> tuple[dict[str, float], int]:
    """The loss over all targets (nats), with the task's own scores, and the number of targets.

    Args:
        module: the task, around the model.
        batches: of the task; targets of -100 do not count.
        test: with the scores of the test alone, such as those of generated texts.
    """
    module.eval()
    module.on_validation_epoch_start()
    count = 0
    for index, batch in enumerate(batches):
        batch = {name: tensor.to(module.device) for name, tensor in batch.items()}
        (module.test_step if test else module.validation_step)(batch, index)
        count += int(module.count(batch))
    scores = {"loss": module.held_out_loss.compute(), **module.scores(), **(module.test_scores() if test else {})}
    return {name: float(value) for name, value in scores.items()}, count
