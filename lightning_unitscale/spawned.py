"""After `ddp_spawn` or `ddp_fork`: the plan in the process that started the others.

Callbacks run in the started processes, and Lightning brings back weights and metrics only. The weights bring the plan
(see `loading`); the callback and the strategy, which saw nothing of the run, are told of it here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from lightning_unitscale.callback import UnitScaling
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.namespaces import classes
from lightning_unitscale.strategy import UnitScalingMixin

if TYPE_CHECKING:
    import pytorch_lightning as pl

_OURS = "_tells_of_plans"


def wrap_recovery() -> None:
    """Make Lightning's launchers of processes tell callback and strategy of the plan that came back; once."""
    for launcher in classes("strategies.launchers.multiprocessing._MultiProcessingLauncher"):
        if not hasattr(launcher.update_main_process_results, _OURS):
            launcher.update_main_process_results = _telling(launcher.update_main_process_results)


def _telling(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def update_main_process_results(self: Any, trainer: pl.Trainer, extra: dict[str, Any]) -> None:
        original(self, trainer, extra)
        plan = plan_of(trainer.lightning_module)
        if plan is None:
            return
        for owner in (trainer.strategy, *trainer.callbacks):  # type: ignore[attr-defined]
            if isinstance(owner, (UnitScaling, UnitScalingMixin)):
                owner.unit_scaling.plan = plan

    setattr(update_main_process_results, _OURS, True)
    return update_main_process_results
