"""A bar of steps in a terminal; in a file, few lines that say as much."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import rich
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_unitscale.cookbook import progress
from lightning_unitscale.cookbook.logs import NotShownAlready
from lightning_unitscale.cookbook.progress import StepBar, StepLines, shown_metrics


class Line(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        self.print("a step")
        return loss

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(shown: pl.Callback, steps: int, go_on: Path | None = None, **options: Any) -> pl.Trainer:
    """Epochs have three batches."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_steps=steps, callbacks=[shown], **quiet, **options)
    trainer.fit(Line(), DataLoader(torch.ones(6, 2), batch_size=2), ckpt_path=go_on)
    return trainer


def test_a_file_gets_ten_lines_with_step_loss_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    fit(StepLines(), 40)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [int(re.findall(r"step (\d+)/40", line)[0]) for line in lines] == list(range(4, 41, 4))
    assert all(re.fullmatch(r"step \d+/40  train/loss [\d.e-]+  0:00:0\d left", line) for line in lines)


@pytest.mark.parametrize("bar", [False, True])
def test_scores_of_a_validation_stand_with_its_step(bar: bool, capsys: pytest.CaptureFixture[str]) -> None:
    class Validated(Line):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val/loss", self.layer(batch).mean(), prog_bar=True)

    shown = StepBar() if bar else StepLines()
    batches = DataLoader(torch.ones(6, 2), batch_size=2)
    often = {"val_check_interval": 12, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(max_steps=40, callbacks=[shown], logger=False, enable_checkpointing=False, **often)
    trainer.fit(Validated(), batches, batches)
    if bar:
        assert "val/loss@36" in shown.get_metrics(trainer, trainer.lightning_module)
        return
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [re.findall(r"val/loss@(\d+) ", line) for line in lines] == [
        *([], [], []),  # steps 4, 8, 12: a line comes before the validation of its step
        *(["12"], ["12"], ["12"], ["24"], ["24"], ["24"], ["36"]),
    ]


def test_a_file_gets_ten_lines_of_a_prediction_too(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = pl.Trainer(callbacks=[StepLines()], logger=False, accelerator="cpu")
    trainer.predict(Line(), DataLoader(torch.ones(60, 2), batch_size=2), return_predictions=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("batch")]
    assert lines == [f"batch {batch}/30  0:00:00 left" for batch in range(3, 31, 3)]


def test_a_day_has_a_hundred_lines_and_never_an_hour_without(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer: Any = SimpleNamespace(global_step=0, estimated_stepping_batches=864_000)
    lines, at = StepLines(), [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: at[0])
    monkeypatch.setattr(lines, "get_metrics", lambda *_: {"train/loss": 1.0})
    module: Any = None
    lines.on_train_start(trainer, module)
    for step in range(1, 86_401):  # a second each, of ten days
        at[0], trainer.global_step = float(step), step
        lines.on_train_batch_end(trainer, module)
    shown = [int(step) for step in re.findall(r"step (\d+)/", capsys.readouterr().out)]
    assert 50 < len(shown) < 150
    assert shown[0] == 30
    assert max(after - before for before, after in pairwise(shown)) < 2 * 3600


def test_the_bar_counts_the_steps_of_all_epochs_and_of_the_run_that_goes_on(tmp_path: Path) -> None:
    first = fit(bar := StepBar(), 4)
    assert (bar.train_progress_bar.completed, bar.train_progress_bar.total) == (4, 4)
    first.save_checkpoint(tmp_path / "last.ckpt")
    fit(bar := StepBar(), 8, tmp_path / "last.ckpt")
    assert (bar.train_progress_bar.completed, bar.train_progress_bar.total) == (8, 8)
    fit(bar := StepBar(), 3, accumulate_grad_batches=2)
    assert (bar.train_progress_bar.completed, bar.train_progress_bar.total) == (3, 3)


@pytest.mark.parametrize(("terminal", "kind"), [(True, StepBar), (False, StepLines)])
def test_a_terminal_gets_the_bar(terminal: bool, kind: type[pl.Callback], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rich, "_console", Console(force_terminal=terminal))
    assert type(progress.progress()) is kind


def test_in_a_pipe_each_thing_is_said_once_and_the_steps_go_by(tmp_path: Path) -> None:
    quick = ["experiment=tiny", "trainer.limit_val_batches=1", "logger=csv", "monitor=none"]
    command = [sys.executable, "-m", "lightning_unitscale.cli", "pretrain", *quick]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.findall(r"^step (\d/2)  train/loss", done.stdout, re.MULTILINE) == ["1/2", "2/2"]
    assert done.stderr.count("unit scaling: scheme=umup") == 1
    assert "Tip" not in done.stderr


def test_the_screen_shows_what_another_package_does_not_show_itself() -> None:
    shown = NotShownAlready()
    for name, own, expected in (("aside.silent", False, True), ("aside.loud", True, False)):
        package = logging.getLogger(name)
        package.addHandler(logging.StreamHandler() if own else logging.FileHandler(os.devnull))
        record = logging.LogRecord(f"{name}.part", logging.WARNING, "", 1, "text", (), None)
        assert shown.filter(record) is expected


def test_losses_come_before_scores_and_these_before_what_was_measured() -> None:
    found = {"v_num": 0, "x_near_1_%": 100.0, "val/accuracy": 0.5, "val/loss": 1.0}
    assert list(shown_metrics(found, 30)) == ["val/loss@30", "val/accuracy@30", "x_near_1_%"]
