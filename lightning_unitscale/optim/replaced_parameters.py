"""Parameters of a plan that the model has lost, or has in another shape or module: a new head, a resized table."""

from __future__ import annotations

from torch import nn

from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.warn_user import warn_user


def warn_of_replaced(module: nn.Module, plan: Plan) -> None:
    """Name those that have no multipliers, or those of what was there before."""
    differences = plan.differences(module)
    for kind, consequence in (
        ("missing", "what took their place has no learning-rate multiplier"),
        ("other shape", "they take the learning-rate multipliers of what was there before"),
        (
            "replaced",
            "they are at a scale of their own, and take the learning-rate multipliers of what was there before",
        ),
    ):
        names = differences[kind]
        if names and plan.changes_training:
            warn_user(
                f"unit scaling: {type(module).__name__} was changed since it was prepared ({kind}: "
                f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}); {consequence}. Change a model before it is "
                "prepared, or between remove_unit_scaling(model) and preparing it anew."
            )
