"""The last state of a training, and Ctrl-C that loses nothing: the running step is finished and saved first."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.trainer.states import TrainerFn


class Interrupted(Exception):  # noqa: N818 (as KeyboardInterrupt)
    """Raised by `trainer.fit` when training was stopped by Ctrl-C and has been saved."""


class LastCheckpoint(Checkpoint):
    """Keeps the last state in `path`: after every validation, better or not, and when Ctrl-C was pressed.

    Lightning's `save_last` (2.6) writes only together with a better score. As a kind of `Checkpoint` this runs after
    all other callbacks, and holds their state; list it after the `ModelCheckpoint` whose scores it is to hold.

    An interrupt in the middle of an optimizer step would leave half of the parameters updated, so the step is finished
    first and the checkpoint continues exactly; a second Ctrl-C stops at once. A validation that is due after the step
    belongs to it; `Trainer.should_stop` is no way to stop, as Lightning then validates even where it is not due, and
    early stopping would count that.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.interrupted = False
        self._saved = False
        self._previous: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes over Ctrl-C."""
        self._previous = signal.signal(signal.SIGINT, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Ends training, once it is saved.

        Raises:
            Interrupted: Ctrl-C came before the last step's end.
        """
        if self._saved:
            raise Interrupted

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Saves if Ctrl-C came during this step."""
        self._save_if_interrupted(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves; what an interrupt saved before a validation that was due is replaced."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves if Ctrl-C came after the last step, and gives it back."""
        if not self._saved:
            self._save_if_interrupted(trainer)
        signal.signal(signal.SIGINT, self._previous)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Gives Ctrl-C back."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _save_if_interrupted(self, trainer: pl.Trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(self.interrupted, all=False):  # on any of the processes
            self.interrupted = self._saved = True
            trainer.save_checkpoint(self.path, weights_only=False)
