"""A run that goes on does so under the options that it began with; they travel with the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning_unitscale.checkpoint import as_plain_data
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.options import PLAN_OPTIONS, Options
from lightning_unitscale.schemes import find, scheme_of


def other_options(plan: Plan, options: Options) -> dict[str, tuple[Any, Any]]:
    """The options under which the plan was made and these, where they differ."""
    theirs, ours = (_spelled_out(as_plain_data(given)) for given in (plan.options, options.to_dict()))
    return {name: (theirs[name], ours[name]) for name in PLAN_OPTIONS if theirs.get(name, ours[name]) != ours[name]}


def check_same_options(plan: Plan, options: Options) -> None:
    """
    Raises:
        UnitScalingError: the plan was made under other options.
    """
    for name, (theirs, ours) in other_options(plan, options).items():
        raise UnitScalingError(
            f"the model (or its checkpoint) was prepared with {name}={theirs!r}, but UnitScaling has "
            f"{name}={ours!r}. Use the same, or start from an unprepared model."
        )


def check_goes_on(checkpoint: Mapping[str, Any], plan: Plan | None, options: Options) -> None:
    """
    Raises:
        UnitScalingError: a run would be resumed under another scaling than it was trained with.
    """
    if plan is not None:
        check_same_options(plan, options)
    elif scheme_of(options).changes_training and _is_of_a_run(checkpoint):
        raise UnitScalingError(
            f"the checkpoint (step {checkpoint['global_step']}) was trained without unit scaling, and "
            f"scheme={options.scheme!r} would change its weights and learning rates. Go on with "
            "scheme='preserve', or load its weights as initial weights without ckpt_path."
        )


def _spelled_out(options: dict[str, Any]) -> dict[str, Any]:
    """The options with all hyperparameters of their scheme, those not given at their defaults."""
    scheme = find(options["scheme"], options.get("hyperparameters"))
    return {**options, "hyperparameters": asdict(scheme)}


def _is_of_a_run(checkpoint: Mapping[str, Any]) -> bool:
    """Whether it has taken steps and can be resumed."""
    return bool(checkpoint.get("global_step", 0) > 0 and checkpoint.get("optimizer_states"))
