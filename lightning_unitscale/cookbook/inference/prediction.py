"""mode=predict: a prediction for every row of a data set, in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from omegaconf import DictConfig
from torch.utils.data import Dataset, Subset

from lightning_unitscale.cookbook.data.examples import loader_of
from lightning_unitscale.cookbook.inference.evaluation import around, held_out
from lightning_unitscale.cookbook.inference.loading import load, load_with_tokenizer, weight_formats
from lightning_unitscale.cookbook.inference.numbers import print_numbers
from lightning_unitscale.cookbook.inference.prediction_file import PredictionWriter, finish, read_rows, rows_done
from lightning_unitscale.cookbook.inference.recorded_run import asked_task
from lightning_unitscale.cookbook.progress import progress
from lightning_unitscale.cookbook.runs import plain, show
from lightning_unitscale.cookbook.tasks import Task
from lightning_unitscale.errors import InputError

Rows = tuple[Task, Sequence[Any], Callable[[list[Any]], Any]]  # the task, the rows, and what makes a batch of some


def predict_rows(cfg: DictConfig, path: str) -> Path:
    """Every row of the data set, after those that an interrupted run has done."""
    output = Path(cfg.output)
    texts = read_rows(cfg.rows, cfg.column) if cfg.rows else None
    done = rows_done(output)
    task, rows, collate = _held_out_rows(cfg, path) if texts is None else _rows_of_texts(cfg, path, texts, done)
    if done > len(rows):
        raise InputError(f"output={output} has {done} rows and the data set only {len(rows)}; give another name")
    begin = time.perf_counter()
    trainer = pl.Trainer(
        accelerator="cpu" if task.device.type == "cpu" else "auto",
        devices=1,
        logger=False,
        callbacks=[PredictionWriter(output, start=done, inputs=rows), *([progress()] if cfg.progress_bar else [])],
        enable_model_summary=False,
        enable_progress_bar=cfg.progress_bar,
    )
    rest: Any = Subset(cast("Dataset[Any]", rows), range(done, len(rows)))
    loader = loader_of(rest, batch_size=cfg.batch_size, collate_fn=collate)
    try:
        trainer.predict(task, loader, return_predictions=False)
    except (KeyboardInterrupt, SystemExit):  # Lightning makes the second of the first
        print(f"\nStopped after {rows_done(output)} of {len(rows)} rows. The same command goes on from there.")
        sys.exit(130)
    finish(output)
    if texts is None:
        show(task, loader_of(rows, batch_size=cfg.batch_size, collate_fn=collate), output.parent / output.stem, {})
    elif files := task.files_of(texts, output.parent / output.stem):
        print(f"to look at or listen to: {len(files)} files in {files[0].parent}")
    seconds = time.perf_counter() - begin
    now = len(rows) - done
    print_numbers(
        rows=f"{now:,} in {seconds:.2f} s, {now / seconds:,.1f} rows/s ({done:,} were done)", output=str(output)
    )
    return output


def _rows_of_texts(cfg: DictConfig, path: str, texts: list[str], done: int) -> Rows:
    found = load_with_tokenizer(cfg, path)
    task = around(asked_task(found, cfg.get("task")), found)
    return task, texts, task.collate_texts(texts[done:] or texts, plain(cfg.generation))


def _held_out_rows(cfg: DictConfig, path: str) -> Rows:
    """The examples that the model's run held out."""
    found = load(cfg, path, weight_formats(cfg)[0])
    if not asked_task(found, cfg.get("task")).predicts_held_out:
        raise InputError(f"mode=predict needs rows=<file with the texts> for a {type(found.model).__name__}")
    task, batches = held_out(cfg, found)
    rows: Any = batches.dataset
    return task, rows, batches.collate_fn
