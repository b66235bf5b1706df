"""The optimizer steps and epochs that a Trainer has counted, for code that takes turns by them.

`global_step` and `current_epoch`, of the Trainer and of its LightningModule, are read off a few counters of its loops.
They are moved ahead while later steps are rehearsed, and put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytorch_lightning as pl


@contextmanager
def clock_kept(trainer: pl.Trainer | None) -> Iterator[None]:
    """Put the counts back on leaving."""
    counters = [] if trainer is None else [*_of_steps(trainer), _of_epochs(trainer)]
    before = [counter.completed for counter in counters]
    try:
        yield
    finally:
        for counter, count in zip(counters, before, strict=True):
            counter.completed = count


def move_clock(trainer: pl.Trainer | None, steps: int, epochs: int) -> None:
    """Let the Trainer think that so many more optimizer steps and epochs are behind it."""
    if trainer is not None:
        for counter in _of_steps(trainer):
            counter.completed += steps
        _of_epochs(trainer).completed += epochs


def _of_steps(trainer: pl.Trainer) -> list[Any]:
    loop = trainer.fit_loop.epoch_loop  # which of its two counters is read depends on the kind of optimization
    return [
        loop.automatic_optimization.optim_progress.optimizer.step.total,
        loop.manual_optimization.optim_step_progress.total,
    ]


def _of_epochs(trainer: pl.Trainer) -> Any:
    return trainer.fit_loop.epoch_progress.current
