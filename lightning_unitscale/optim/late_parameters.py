"""Parameters that start to learn after the plan was made: a layer unfrozen, a head whose loss comes every other step.

The recorded step had no use for them, so the plan has no rule, and they are trained at the scale and the learning rate
of the untouched model among parameters that are not. That is noticed when their first gradient comes.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lightning_unitscale.engine.plan.parameter_plan import FROZEN, UNUSED
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.warn_user import warn_user

NAMES_SHOWN = 3


def may_learn_late(plan: Plan) -> bool:
    """Whether the plan leaves parameters alone only because the recorded step did."""
    return plan.changes_training and any(p.reason in (FROZEN, UNUSED) for p in plan.parameters.values())


class LateParameters:
    """The parameters that a plan leaves alone because the recorded step did, until they learn."""

    def __init__(self, plan: Plan, named: Iterable[tuple[str, Tensor]]) -> None:
        reasons = {name: p.reason for name, p in plan.parameters.items() if p.reason in (FROZEN, UNUSED)}
        self._waiting = [(name, parameter) for name, parameter in named if name in reasons] if reasons else []
        self._reasons = reasons

    def warn_of_those_that_learn(self) -> None:
        """Warn, once for each, of the parameters that have a gradient now."""
        learning = [name for name, parameter in self._waiting if parameter.requires_grad and parameter.grad is not None]
        if not learning:
            return
        self._waiting = [(name, parameter) for name, parameter in self._waiting if name not in learning]
        shown = ", ".join(f"{name} ({self._reasons[name]})" for name in learning[:NAMES_SHOWN])
        warn_user(
            f"unit scaling: {len(learning)} parameters learn now that the plan leaves alone: {shown}"
            f"{' …' if len(learning) > NAMES_SHOWN else ''}. They keep the untouched model's scale and learning rate, "
            "which the others do not. Prepare the model with a step in which they take part (all blocks, heads and "
            "losses, nothing frozen), or, if it is meant, list them in skip."
        )
