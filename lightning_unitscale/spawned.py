"""After `ddp_spawn` or `ddp_fork`: the plan in the process that started the others.

Callbacks run in the started processes, and Lightning brings back weights and metrics only. The weights bring the plan
(see `loading`); the callback and the strategy, which saw nothing of the run, are told of it here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_unitscale.callback import UnitScaling
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.namespaces import callbacks_of
from lightning_unitscale.strategy import UnitScalingMixin

if TYPE_CHECKING:
    import pytorch_lightning as pl


def tell_of_plan(trainer: pl.Trainer) -> None:
    """The plan of the trainer's module, if it has one, is that of its callback and strategy."""
    plan = plan_of(trainer.lightning_module)
    if plan is None:
        return
    for owner in (trainer.strategy, *callbacks_of(trainer)):
        if isinstance(owner, (UnitScaling, UnitScalingMixin)):
            owner.unit_scaling.plan = plan
