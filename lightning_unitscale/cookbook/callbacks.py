"""Callbacks of the recipes: exact continuation, an end that loses nothing, and the plan that is shown."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from lightning_unitscale.callback import UnitScaling
from lightning_unitscale.cookbook.tables import terminal_width
from lightning_unitscale.errors import InputError
from lightning_unitscale.namespaces import callbacks_of


class RandomNumbers(pl.Callback):
    """Each step draws its random numbers (dropout masks, noise) where the step before it left off.

    The state of torch's generators is in every checkpoint. What is drawn between two steps does not count: validation,
    and Lightning's own preparations; a checkpoint before a validation and one after it continue alike.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The CPU's generator, and those of all CUDA devices, as the last step left them."""
        return self._state or _generators()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """To be put in force when the next step begins."""
        self._state = state_dict

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Go on where the last step ended."""
        if self._state is not None:
            torch.set_rng_state(self._state["cpu"].cpu())
            if len(self._state["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all([state.cpu() for state in self._state["cuda"]])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Note where this step ended."""
        self._state = _generators()


def _generators() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


class BestCheckpoint(ModelCheckpoint):
    """Lightning's, whose best score counts on when the run goes on in another folder.

    The best checkpoint then stays in the folder of the earlier run until there is a better one.

    Raises:
        InputError: the best checkpoint of the earlier run is not there any more.
    """

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over score and path."""
        best = state_dict["best_model_path"]
        if best and not Path(best).exists():
            raise InputError(
                f"ckpt_path: the best checkpoint of this run so far, {best}, is not there. Put it back, or begin a new "
                "run from the weights: model.path=<the checkpoint>"
            )
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})


class Stopped(Exception):  # noqa: N818 (as KeyboardInterrupt)
    """Raised by `trainer.fit` when training ended before its end; the text says why and what to do."""


class Interrupted(Stopped):
    """Training was stopped by Ctrl-C and has been saved."""


class Diverged(Stopped):
    """The loss is no number any more; the weights are still those before that step."""


class StopWhenDiverged(pl.Callback):
    """Ends training at the first loss that is infinite or no number, before it gets into the weights.

    Args:
        learning_rate: the one of the run, to name a better one.

    Attributes:
        first_loss: of the first step, which the model takes as it was; None before. A run that goes on keeps it.
    """

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.first_loss: float | None = None
        self._loss = torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        """The first loss."""
        return {"first_loss": self.first_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The first loss."""
        self.first_loss = state_dict["first_loss"]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Notes the loss; reading it here would wait for the device at every batch of an accumulated step."""
        self._loss = self._loss.to(loss.device) + loss.detach()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """
        Raises:
            Diverged: the loss of this step is not finite, on any of the processes.
        """
        loss, self._loss = float(self._loss), torch.zeros(())
        if trainer.strategy.reduce_boolean_decision(not math.isfinite(loss), all=False):
            raise diverged(trainer, self.learning_rate, f"the loss of step {trainer.global_step}", loss)
        if self.first_loss is None and trainer.global_step == 0:
            self.first_loss = loss

    def rate_to_try(self, trainer: pl.Trainer) -> float:
        """The usual rate in place of one that is far from it, else a tenth."""
        usual = usual_rate(trainer)
        return usual if not usual / 10 < self.learning_rate <= usual else self.learning_rate / 10


def diverged(trainer: pl.Trainer, learning_rate: float, what: str, loss: float) -> Diverged:
    """What to say of a loss that is no number, and what to do."""
    rate = min(learning_rate / 10, usual_rate(trainer))
    return Diverged(f"training diverged: {what} is {loss}. Try a smaller learning rate: optimizer.lr={rate:g}")


def usual_rate(trainer: pl.Trainer) -> float:
    """The learning rate that is usual for these units and this optimizer."""
    plans = [c.plan for c in callbacks_of(trainer) if isinstance(c, UnitScaling)]
    if any(plan is not None and plan.lr_units == "umup" for plan in plans):
        return 1.0
    return 0.1 if isinstance(trainer.optimizers[0], torch.optim.SGD) else 1e-3


class LastCheckpoint(Checkpoint):
    """Keeps the last state in `path`: after every validation, better or not, and when Ctrl-C was pressed.

    Lightning's `save_last` (2.6) writes only together with a better score. As a kind of `Checkpoint` this runs after
    all other callbacks, and holds their state; list it after the `ModelCheckpoint` whose scores it is to hold.

    An interrupt in the middle of an optimizer step would leave half of the parameters updated, so the step is finished
    first and the checkpoint continues exactly; a second Ctrl-C stops at once. A validation that is due after the step
    belongs to it; `Trainer.should_stop` is no way to stop, as Lightning then validates even where it is not due, and
    early stopping would count that.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
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
        # not by print: the signal may have come in the middle of one
        os.write(2, b"\nstopping after this step, and saving it; Ctrl-C again stops at once\n")

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Ends training, once it is saved.

        Raises:
            Interrupted: Ctrl-C came before the last step's end.
        """
        if self._saved:
            raise Interrupted(
                f"stopped at step {trainer.global_step}; go on with ckpt_path={self.path} (the other settings are kept)"
            )

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


class PrintPlan(pl.Callback):
    """Shows what unit scaling does to each parameter, once, when the first step has shown the model."""

    def __init__(self) -> None:
        self._printed = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Prints above the progress bar."""
        for callback in callbacks_of(trainer):
            if isinstance(callback, UnitScaling) and callback.plan is not None and not self._printed:
                _, _, table = callback.plan.summary(width=terminal_width()).partition("\n")  # the first is logged
                pl_module.print(table)
                self._printed = True
