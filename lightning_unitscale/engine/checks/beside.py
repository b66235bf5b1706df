"""Warn of code of the step that goes past the plan: it reads weights where no factor can stand, or writes to them."""

from __future__ import annotations

from torch import nn

from lightning_unitscale.engine.analysis.readings import find_readings
from lightning_unitscale.engine.analysis.structure import Structure
from lightning_unitscale.engine.checks.trained_weights import rescaled
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.record.trace import Trace
from lightning_unitscale.warn_user import warn_user


def warn_of_code_beside(module: nn.Module, plan: Plan, trace: Trace) -> None:
    """Say which weights a plan about to be put in force leaves alone for code beside it, and which the step writes."""
    if not plan.changes_training:
        return
    reasons = find_readings(Structure(trace)).left_alone
    alone = [name for name, parameter in plan.parameters.items() if parameter.reason == reasons.get(name)]
    if alone:
        warn_user(f"unit scaling leaves {some(alone)} of {type(module).__name__} unscaled, as {reasons[alone[0]]}.")
    changed = set(rescaled(plan))
    written = [name for name in trace.written if name in changed]
    if written:
        warn_user(written_outside(written, trace.written[written[0]]))


def written_outside(names: list[str], where: str) -> str:
    """What to say of parameters that something else than the optimizer writes to."""
    return (
        f"unit scaling: {some(names)} written outside the optimizer, {where}. They are stored at another scale than "
        "the model's author knew, so a clamp, a norm or a value set there means something else. Leave them as they are "
        "(skip), or the whole model (scheme='preserve'); if the values come from this model as it is prepared now, all "
        "is well."
    )


def some(names: list[str]) -> str:
    """The first few names."""
    return ", ".join(names[:3]) + (f" … ({len(names)} in all)" if len(names) > 3 else "")
