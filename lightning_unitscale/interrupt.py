"""Ctrl-C that loses nothing: the running step is finished, saved, and training ends."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl


class SaveOnInterrupt(pl.Callback):
    """Saves `path` after the step during which Ctrl-C was pressed; a second Ctrl-C stops at once.

    An interrupt in the middle of an optimizer step would leave half of the parameters updated, so
    the step is finished first and the checkpoint continues exactly.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.interrupted = False
        self._previous: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes over Ctrl-C."""
        self._previous = signal.signal(signal.SIGINT, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Saves and stops if Ctrl-C came during this step."""
        if trainer.strategy.reduce_boolean_decision(self.interrupted, all=False):  # on any of the processes
            self.interrupted = True
            trainer.save_checkpoint(self.path, weights_only=False)
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives Ctrl-C back."""
        signal.signal(signal.SIGINT, self._previous)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Gives Ctrl-C back."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
