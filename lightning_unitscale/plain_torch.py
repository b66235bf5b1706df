"""Unit scaling of a plain `nn.Module`, without Lightning: `unit_scale`, `recalibrating` and `remove_unit_scaling`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_unitscale.engine.checks.calibration import Calibration, fall_back
from lightning_unitscale.engine.checks.gradients import rehearsed_gradients
from lightning_unitscale.engine.checks.verify_casts import verify_casts
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.in_force import remove
from lightning_unitscale.near_names import suggests_arguments
from lightning_unitscale.options import RECALIBRATE, Options
from lightning_unitscale.prepare import prepare
from lightning_unitscale.record_step import Step
from lightning_unitscale.warn_user import warn_user


@suggests_arguments
def unit_scale(
    module: nn.Module,
    step: Callable[[nn.Module], Any],
    scheme: str = "umup",
    *,
    format: str | None = None,
    storage: str = "folded",
    weights: bool = True,
    activations: bool = True,
    gradients: bool = True,
    lr_units: str = "standard",
    skip: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    recalibrate: Sequence[int] = RECALIBRATE,
    verify: bool = True,
) -> Plan:
    """Prepare a model in place and return the plan.

    Args:
        module: any model; its parameters stay the same objects.
        step: `step(module)` runs one training step's forward pass on real data and returns the scalar loss
            (or a dict with "loss"). It is called to record the model; nothing it changes is kept.
        scheme … verify: as for `UnitScaling`. With a `format`, operand scales are measured on this step;
            `recalibrate` needs `recalibrating` around your later ones.

    Returns:
        The plan in force; `scale_learning_rates(optimizer, plan)` takes its learning-rate multipliers.

    Raises:
        UnitScalingError: an option is wrong, nothing in the model can be scaled, or the loss is not finite.
    """
    options = Options(
        scheme=scheme,
        format=format,
        storage=storage,
        weights=weights,
        activations=activations,
        gradients=gradients,
        lr_units=lr_units,
        skip=skip,
        overrides=overrides or {},
        hyperparameters=hyperparameters or {},
        recalibrate=recalibrate,
        verify=verify,
    )
    plan = prepare(module, lambda _: step(module), options)
    _measure_operands(plan, lambda _: step(module), options)
    return plan


def _measure_operands(plan: Plan, step: Step, options: Options) -> None:
    """Measure operand scales on one step, forward and backward, that leaves no trace; a Trainer does it as it trains.

    Warns:
        of sites that cast nothing, as an operand of theirs is all 0 in this step (behind zero-initialised weights) or
        they were not called, until they are measured again.
    """
    if not plan.cast_sites:
        return
    module = plan.model
    calibration = Calibration(module, plan, options.recalibrate)
    rehearsed_gradients(module, step, None, observer=calibration.observe(0))
    calibration.finish()
    if options.verify:
        for use, problem in verify_casts(module, plan, step).items():
            fall_back(module, plan, use, problem)
    unknown = [site.name for site in plan.cast_sites if not site.operand_scales]
    if unknown:
        warn_user(
            f"unit scaling: {len(unknown)} sites stay in the compute dtype, as an operand of theirs was all 0 or not "
            f"seen in this step: {', '.join(unknown[:3])}{' …' if len(unknown) > 3 else ''}. Inside `recalibrating` "
            "they are measured again as the model trains."
        )


@contextmanager
def recalibrating(plan: Plan, step: int) -> Iterator[None]:
    """Measure operand scales again, on the steps of `recalibrate`; on all others nothing is done.

    ```python
    plan = unit_scale(model, lambda m: loss_of(m, first_batch), format="fp8")
    for step, batch in enumerate(loader):
        with recalibrating(plan, step):
            loss_of(model, batch).backward()
        optimizer.step()
    ```

    In a Trainer, `UnitScaling` does it. On a measured step compiled code runs uncompiled, elements that the casts flush
    or saturate are counted, and sites whose casts lose too much get a new scale, then the compute dtype. With
    `torch.distributed`, all processes must enter it at the same steps.

    Args:
        plan: in force on the model that runs inside.
        step: optimizer steps taken before, counted on when a run is resumed. Forward and backward passes of all
            micro-batches of the step belong inside.

    Raises:
        UnitScalingError: the plan is not in force on any model.
    """
    calibration = Calibration(plan.model, plan, plan.options["recalibrate"])
    if not calibration.due(step):
        yield
        return
    calibration.begin(step)
    try:
        yield
        calibration.finish()
    finally:
        calibration.abort()


def remove_unit_scaling(module: nn.Module) -> nn.Module:
    """Make a prepared model a plain one again, with the same function to rounding; returns it.

    Every factor that is explicit in the forward pass is moved into weights.

    Raises:
        UnitScalingError: the model is not prepared, or a factor has no weight to go into (a tied weight with two
            factors, say); the site is named, and the model is left as it was.
    """
    remove(module)
    return module
