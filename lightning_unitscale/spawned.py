"""After `ddp_spawn` or `ddp_fork`: the plan in the process that started the others.

Callbacks run in the started processes, and Lightning brings back weights and metrics only. The weights bring the plan
(see `loading`); the callback and the strategy, which saw nothing of the run, are told of it here.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from lightning_unitscale.callback import UnitScaling
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.strategy import UnitScalingMixin

_OURS = "_tells_of_plans"


def wrap_recovery() -> None:
    """Make Lightning's launcher of processes tell callback and strategy of the plan that came back; once."""
    original = _MultiProcessingLauncher.update_main_process_results
    if hasattr(original, _OURS):
        return

    @wraps(original)
    def update_main_process_results(self: _MultiProcessingLauncher, trainer: pl.Trainer, extra: dict[str, Any]) -> None:
        original(self, trainer, extra)
        plan = plan_of(trainer.lightning_module)
        if plan is None:
            return
        for owner in (trainer.strategy, *trainer.callbacks):  # type: ignore[attr-defined]
            if isinstance(owner, (UnitScaling, UnitScalingMixin)):
                owner.unit_scaling.plan = plan

    setattr(update_main_process_results, _OURS, True)
    _MultiProcessingLauncher.update_main_process_results = update_main_process_results  # type: ignore[method-assign]
