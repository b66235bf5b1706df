"""How far a training or prediction is: a bar in a terminal; in a file or a pipe, a line now and then."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar
from pytorch_lightning.callbacks.progress.rich_progress import (
    BatchesProcessedColumn,
    CustomBarColumn,
    RichProgressBarTheme,
)
from rich import get_console
from rich.progress import TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

LINES = 10  # at most every tenth of the steps …
PAUSE = 30.0  # … and for as long as a tenth takes more, every 30 seconds at first,
GROWTH = 0.05  # later after so much of the time that has gone by: a day has about a hundred lines


def progress() -> ProgressBar:
    """What suits the place that is written to."""
    console = get_console()
    return StepBar() if console.is_terminal or console.is_jupyter else StepLines()


def shown_metrics(found: Mapping[str, Any], validated: int) -> dict[str, Any]:
    """Without the version of the logger; losses, then other scores (`val/accuracy`), then what the monitor measured.

    Args:
        validated: the step of the last validation, which stands with its scores: `val/loss@100`.
    """
    named = [
        (f"{name}@{validated}" if name.startswith("val/") else name, value)
        for name, value in found.items()
        if name != "v_num"
    ]
    return dict(sorted(named, key=lambda item: ("loss" not in item[0], "/" not in item[0])))


class StepBar(RichProgressBar):
    """Lightning's on one line, of the optimizer's steps: crops are drawn at random, so there are no epochs."""

    def __init__(self) -> None:
        super().__init__(leave=True, theme=RichProgressBarTheme(metrics_format=".4g", metrics_text_delimiter="  "))
        self._validated = 0

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        """A short bar, so that there is room for the scores."""
        theme = self.theme
        bar = CustomBarColumn(
            bar_width=12,
            complete_style=theme.progress_bar,
            finished_style=theme.progress_bar_finished,
            pulse_style=theme.progress_bar_pulse,
        )
        return [
            TextColumn("[progress.description]{task.description}"),
            bar,
            BatchesProcessedColumn(style=theme.batch_progress),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        ]

    def _init_progress(self, trainer: pl.Trainer) -> None:
        super()._init_progress(trainer)
        if self.progress is None or self._metric_component is None:
            return
        columns: list[Any] = list(self.progress.columns)
        for column in columns:
            column._table_column = Column(no_wrap=column is not self._metric_component)  # that one alone gives way
        render = self._metric_component.render

        def on_one_line(task: Any) -> Text:
            text = render(task)
            text.no_wrap, text.overflow = True, "ellipsis"
            return text

        self._metric_component.render = on_one_line  # type: ignore[method-assign]  # of this bar alone

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The bar of the first epoch is that of all."""
        if self.is_enabled and self.train_progress_bar_id is None:
            self._initialize_train_progress_bar_id()

    @property
    def total_train_batches(self) -> float:
        """Steps in all, those before a resumption too."""
        return self.trainer.estimated_stepping_batches

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Steps in place of batches, which begin anew with each epoch and are more than steps under accumulation."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes when it was."""
        self._validated = trainer.global_step
        super().on_validation_end(trainer, pl_module)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Losses first: what does not fit on the line is cut at its end."""
        return shown_metrics(super().get_metrics(trainer, pl_module), self._validated)

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"


class StepLines(ProgressBar):
    """Step, scores and time left, or batches predicted, each time on a new line, for log files."""

    def __init__(self) -> None:
        super().__init__()
        self.is_enabled = True
        self._begun = self._last = 0.0  # seconds of a clock
        self._first = self._shown = self._validated = 0  # steps: where training began, of the last line, of validation

    def disable(self) -> None:
        """Lightning calls this in all processes but the first."""
        self.is_enabled = False

    def enable(self) -> None:
        """What it is without `disable`."""
        self.is_enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Time is counted from here."""
        self._begin(trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """A line, if one is due."""
        step, steps = trainer.global_step, int(trainer.estimated_stepping_batches)
        if step != self._shown and (left := self._left_if_due(step, steps)) is not None:
            scores = shown_metrics(self.get_metrics(trainer, pl_module), self._validated)
            numbers = "".join(f"  {name} {value:.4g}" for name, value in scores.items())
            print(f"step {step}/{steps}{numbers}  {left} left", flush=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes when it was."""
        self._validated = trainer.global_step

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Time is counted from here."""
        self._begin(0)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """A line, if one is due."""
        batches = int(sum(trainer.num_predict_batches))
        if (left := self._left_if_due(batch_idx + 1, batches)) is not None:
            print(f"batch {batch_idx + 1}/{batches}  {left} left", flush=True)

    def _begin(self, step: int) -> None:
        self._begun = self._last = time.monotonic()
        self._first = self._shown = step

    def _left_if_due(self, step: int, steps: int) -> timedelta | None:
        """The time left, where it is time for a line."""
        now = time.monotonic()
        tenth = step * LINES // steps > self._shown * LINES // steps
        if not self.is_enabled or not (tenth or now - self._last >= max(PAUSE, GROWTH * (now - self._begun))):
            return None
        self._shown, self._last = step, now
        return timedelta(seconds=round((steps - step) * (now - self._begun) / (step - self._first)))
