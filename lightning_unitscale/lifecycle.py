"""What happens when in one Trainer: unit scaling inside its Strategy, which sees the first real batch and checkpoints.

`Lifecycle` is the one implementation. A named strategy (`UnitScalingMixin`) calls it from its overridden methods; the
callback alone wraps the same few methods on the instance of whatever strategy the Trainer has.

    Lightning calls          we run                   which does
    setup                    before_run               a prepared model must be whole; the `log` of a compiled
                                                      LightningModule is kept out of the compiler
    setup                    before_wrapping          of the strategy: under FSDP1 and DeepSpeed, which flatten
                                                      parameters, the plan is made here, with the first batch
    load_checkpoint          around_loading           before_loading at once, where the strategy loads the weights here
    load_model_state_dict    before_loading           the checkpoint's plan is put in force, then weights are loaded
    on_train_batch_start     before_train_batch       no plan yet: the step is rehearsed on this batch, and the plan
                                                      that follows is put in force. Then, where it is not done yet:
                                                      optimizers get their learning-rate multipliers, FP16 gradients
                                                      their loss scale, and a step that is due is measured
    backward                 around_backward          starts from the loss scale, if there is one
    optimizer_step           around_optimizer_step    a step whose FP16 gradients overflowed is left out, loudly
    on_train_batch_end       after_train_batch        after a measured step, operands are cast with the scales found
    save_checkpoint          around_saving            a checkpoint takes its name when it is whole
    on_save_checkpoint       before_saving            the plan is saved beside the weights
    teardown                 after_run                `release`; an error if no batch had a loss to prepare with
    on_exception             release                  strategy, optimizers and `log` are as before; the model keeps
                                                      its plan
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_unitscale.averages import averages_of
from lightning_unitscale.before_wrapping import (
    DEEPSPEED,
    ZERO3,
    check_options,
    check_plan,
    check_whole,
    engine_that_flattens,
    first_batch,
    plan_to_go_on_with,
)
from lightning_unitscale.checkpoint import as_plain_data, plan_in, prepare_for_loading
from lightning_unitscale.engine.checks.calibration import Calibration, check_device, fall_back
from lightning_unitscale.engine.checks.verify_casts import verify_casts
from lightning_unitscale.engine.plan.plan import Plan, plan_of
from lightning_unitscale.engine.plan.state_dict import PLAN_KEY
from lightning_unitscale.engine.plan.summary import headline
from lightning_unitscale.engine.runtime.fp8_gather import gather_in_fp8
from lightning_unitscale.engine.runtime.install import rescale_parameters
from lightning_unitscale.engine.runtime.placement import check_placement
from lightning_unitscale.errors import NoLossError, UnitScalingError
from lightning_unitscale.in_force import adopt, forget, put_in_force
from lightning_unitscale.loss_scale import LossScale, find_loss_scale, needs_loss_scale
from lightning_unitscale.namespaces import callbacks_of, classes
from lightning_unitscale.options import Options
from lightning_unitscale.prepare import prepare
from lightning_unitscale.record_step import Step
from lightning_unitscale.run_optimizers import RunOptimizers
from lightning_unitscale.same_options import check_goes_on, check_same_options, other_options
from lightning_unitscale.schemes import scheme_of
from lightning_unitscale.sharded_checkpoint import (
    agree_on_plan,
    all_but_weights,
    full_states_unmarked,
    loads_weights_with_file,
)
from lightning_unitscale.warn_user import warn_user
from lightning_unitscale.whole_checkpoints import read_whole, write_whole
from lightning_unitscale.wrapped_methods import WrappedMethods

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning.strategies import Strategy


class Lifecycle:
    """Unit scaling of one Trainer's model.

    Args:
        options: what to do.
        optimizer_family: a name in `optim.families`, for optimizer classes that `optimizer_family` does not know.

    Attributes:
        plan: the plan in force, from the first training step on; None before.
        fp8_gather: whether weights that `fully_shard` has sharded are gathered in FP8, once scales are known.

    Raises:
        UnitScalingError: there is no such scheme, hyperparameter or family.
    """

    def __init__(self, options: Options, optimizer_family: str | None = None) -> None:
        scheme_of(options)
        self.options = options
        self.plan: Plan | None = None
        self.fp8_gather = False
        self._optimizers = RunOptimizers(optimizer_family)
        self._calibration: Calibration | None = None
        self._loss_scale: LossScale | None = None
        self._wrapped: WrappedMethods | None = None
        self._engine: WrappedMethods | None = None
        self._uncompiled: pl.LightningModule | None = None
        self._without_loss: NoLossError | None = None

    @property
    def settings(self) -> tuple[Options, str | None]:
        """All that it was told."""
        return self.options, self._optimizers.family

    @settings.setter
    def settings(self, settings: tuple[Options, str | None]) -> None:
        self.options, self._optimizers.family = settings

    @property
    def _changes_training(self) -> bool:
        return scheme_of(self.options).changes_training

    # --- before and after a run -------------------------------------------------------------------------------

    def wrap(self, strategy: Strategy) -> None:
        """Take over the methods of a strategy instance that is not a `UnitScalingMixin`."""
        if self._wrapped is None or self._wrapped.strategy is not strategy:
            self._wrapped = WrappedMethods(
                strategy,
                before={
                    "setup": self.before_wrapping,
                    "on_train_batch_start": self.before_train_batch,
                    "load_model_state_dict": self.before_loading,
                },
                around={
                    "backward": self.around_backward,
                    "optimizer_step": self.around_optimizer_step,
                    "load_checkpoint": self.around_loading,
                    "save_checkpoint": self.around_saving,
                },
            )

    def before_run(self, module: pl.LightningModule) -> None:
        """Keep `log` of a compiled LightningModule out of the compiler, which it crashes (torch 2.12, 2.13).

        Raises:
            UnitScalingError: a part of a prepared model was replaced, and its factor with it.
        """
        check_placement(module)
        if getattr(module, "_compiler_ctx", None) is not None and "log" not in module.__dict__:
            module.__dict__["log"] = torch.compiler.disable(module.log)
            self._uncompiled = module

    def before_wrapping(self, strategy: Strategy, trainer: pl.Trainer) -> None:
        """Under FSDP1 and DeepSpeed, put a plan in force while parameters still are what the model says they are.

        Raises:
            UnitScalingError: as `before_train_batch`; or the options ask for what these two can't do.
        """
        engine = engine_that_flattens(strategy)
        if engine is None or trainer.state.fn != "fit":
            return
        check_options(strategy, self.options)
        module = _module_of(strategy)
        if (checkpoint := plan_to_go_on_with(trainer)) is not None:
            self.before_loading(strategy, checkpoint)
        plan = self._plan_in_force(module)
        if plan is None:
            check_whole(module, engine)
            with first_batch(trainer, strategy) as batch:
                plan = self._prepare(strategy, module, _training_step(batch, 0), 0)
        if plan is None:
            raise UnitScalingError(f"the first batch gave no loss, and under {engine} a plan is made with no other.")
        check_plan(plan, engine)
        self.plan = plan
        if engine in (DEEPSPEED, ZERO3):
            self._engine = WrappedMethods(
                strategy, before={}, around={"_setup_model_and_optimizer": self._around_engine}
            )

    def _around_engine(
        self, strategy: Strategy, proceed: Callable[..., Any], model: nn.Module, optimizer: Optimizer, *args: Any
    ) -> Any:
        assert self.plan is not None

        def with_its_schedule(given: Optimizer) -> Any:  # without it Lightning would never step it
            return proceed(model, given, *args)

        return self._optimizers.hand_over(with_its_schedule, optimizer, self.plan, _module_of(strategy))

    def after_run(self) -> None:
        """Leave the strategy as it was.

        Raises:
            NoLossError: there were batches, and none had a loss to prepare the model with.
        """
        self.release()
        error, self._without_loss = self._without_loss, None
        if error is not None:
            raise error

    def release(self) -> None:
        """Give strategy, optimizers and module their own methods back; the model keeps its plan."""
        if self._wrapped is not None:
            self._wrapped.undo()
            self._wrapped = None
        if self._engine is not None:
            self._engine.undo()
            self._engine = None
        if self._uncompiled is not None:
            self._uncompiled.__dict__.pop("log", None)
            self._uncompiled = None
        self._optimizers.release()
        if self._calibration is not None:
            self._calibration.abort()
            self._calibration = None
        if self._loss_scale is not None:
            self._loss_scale.remove()
            self._loss_scale = None

    # --- before a batch ---------------------------------------------------------------------------------------

    def before_train_batch(self, strategy: Strategy, batch: Any, batch_idx: int) -> None:
        """See to it that a plan is in force, and to all that goes with it.

        Raises:
            UnitScalingError: the model can't be prepared, or its plan was made with other options.
        """
        module = _module_of(strategy)
        check_placement(module)
        step = _training_step(batch, batch_idx)
        plan = self._plan_in_force(module)
        if plan is None:
            plan = self._prepare(strategy, module, step, batch_idx)
        if plan is None:
            return  # this batch has no loss, the next may have one
        self.plan, self._without_loss = plan, None
        for optimizer in strategy.optimizers:
            self._optimizers.scale(optimizer, plan, module)
        self._scale_losses(strategy, module, plan, step)
        self._measure_if_due(module, plan)

    def _plan_in_force(self, module: pl.LightningModule) -> Plan | None:
        """The model's plan; None if it is to be prepared.

        Where training is to stay as it was, a plan whose weights alone are the function gives way to one of our own.
        """
        models = [module, *averages_of(module.trainer)]
        plan, *_ = [adopt(model) for model in models]
        if plan is None or plan is self.plan:
            return plan
        if not self._changes_training and plan.is_plain and other_options(plan, self.options):
            for model in models:
                if plan_of(model) is not None:
                    forget(model)
            return None
        check_same_options(plan, self.options)
        return plan

    def _prepare(self, strategy: Strategy, module: pl.LightningModule, step: Step, batch_idx: int) -> Plan | None:
        """Rehearse the step and put its plan in force on the model and its averages; None if the step has no loss."""
        if self._changes_training:
            self._optimizers.check(strategy.optimizers, self.options)
            _refuse_pruning(module.trainer)
        try:
            plan = prepare(
                *(module, step, self.options, module.trainer),
                agree=lambda plan: strategy.broadcast(plan, src=0),
                average=lambda tensor: strategy.reduce(tensor, reduce_op="mean"),
            )
        except NoLossError as error:
            self._wait_for_a_loss(error, module.trainer, batch_idx)
            return None
        _announce(plan)
        for average in averages_of(module.trainer):
            rescale_parameters(average, plan)
            put_in_force(average, Plan.from_dict(plan.to_dict()))
        return plan

    def _wait_for_a_loss(self, error: NoLossError, trainer: pl.Trainer, batch_idx: int) -> None:
        if trainer.world_size > 1:  # another process may have a loss, and waits for this one
            raise error
        if self._without_loss is None:
            warn_user(
                f"unit scaling: the step on batch {batch_idx} gives no loss; the model stays as it is until a "
                "batch has one."
            )
        self._without_loss = error

    def _scale_losses(self, strategy: Strategy, module: pl.LightningModule, plan: Plan, step: Step) -> None:
        """Give losses a scale if gradients travel in FP16 and no GradScaler sees to it."""
        if self._loss_scale is not None or self.options.format != "fp16" or not self.options.gradients:
            return
        if not needs_loss_scale(module) or getattr(strategy.precision_plugin, "scaler", None) is not None:
            return
        if plan.loss_scale is None:
            plan.loss_scale = strategy.broadcast(find_loss_scale(module, step, module.trainer), src=0)
        self._loss_scale = LossScale(module, plan.loss_scale)

    def _measure_if_due(self, module: pl.LightningModule, plan: Plan) -> None:
        """Watch the operands of this step's casts, if the schedule names it; over all micro-batches of the step."""
        if self._calibration is None or self._calibration.plan is not plan:
            check_device(module, plan)
            self._calibration = Calibration(module, plan, self.options.recalibrate)
        step = module.trainer.global_step
        if self._calibration.step is None and self._calibration.due(step):
            self._calibration.begin(step)

    # --- in a step, and after it ------------------------------------------------------------------------------

    def around_backward(
        self, strategy: Strategy, proceed: Callable[..., Any], closure_loss: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Start the backward pass from the loss scale, if there is one."""
        if self._loss_scale is None:
            return proceed(closure_loss, *args, **kwargs)
        with self._loss_scale.seeded(closure_loss) as seeded:
            return proceed(seeded, *args, **kwargs)

    def around_optimizer_step(
        self,
        strategy: Strategy,
        proceed: Callable[..., Any],
        optimizer: Optimizer,
        closure: Callable[[], Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Leave a step out, loudly, if gradients that travelled in FP16 are not finite."""
        scale, plan = self._loss_scale, self.plan
        if scale is None or plan is None:
            return proceed(optimizer, closure, *args, **kwargs)
        step = _module_of(strategy).trainer.global_step

        def checked() -> Any:
            output = closure()
            scale.leave_out_overflow(optimizer, step)
            plan.loss_scale = scale.scale
            return output

        return proceed(optimizer, checked, *args, **kwargs)

    def after_train_batch(self, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Once a measured step is complete, cast with what it showed; the first time, check the casts."""
        calibration, trainer = self._calibration, module.trainer
        if calibration is None or calibration.step is None or trainer.global_step <= calibration.step:
            return
        first = not calibration.plan.measured_at
        calibration.finish()
        if first and self.options.verify:
            problems = verify_casts(module, calibration.plan, _training_step(batch, batch_idx), trainer)
            for use, problem in trainer.strategy.broadcast(problems, src=0).items():
                fall_back(module, calibration.plan, use, problem)
        if self.fp8_gather and calibration.plan.cast_sites:
            gather_in_fp8(module)

    # --- checkpoints ------------------------------------------------------------------------------------------

    def before_loading(self, strategy: Strategy, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put the checkpoint's plan in force before its weights are loaded.

        Raises:
            UnitScalingError: a run would be resumed under another scaling than it was trained with, or the plan is
                of another model.
        """
        module = _module_of(strategy)
        plan = plan_in(checkpoint)
        if plan is None:
            self.plan = None  # as when the Tuner puts the model back to what it was before its trials
        if module.trainer.state.fn == "fit":
            check_goes_on(checkpoint, plan, self.options)
        for model in (module, *averages_of(module.trainer)):
            prepare_for_loading(model, plan)

    def around_loading(
        self, strategy: Strategy, proceed: Callable[..., Any], checkpoint_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Put the plan in force before a strategy of sharded models reads weights into them, which it does at once.

        Raises:
            UnitScalingError: as `before_loading`.
        """
        if not loads_weights_with_file(strategy):
            return read_whole(proceed, checkpoint_path, *args, **kwargs)
        path = Path(strategy.broadcast(checkpoint_path))
        self.before_loading(strategy, all_but_weights(path))
        with full_states_unmarked(_module_of(strategy)):
            return proceed(path, *args, **kwargs)

    def before_saving(self, module: pl.LightningModule | None, checkpoint: dict[str, Any]) -> None:
        """Put the plan into a checkpoint about to be written."""
        plan = plan_of(module) if module is not None else None
        if plan is not None:
            checkpoint[PLAN_KEY] = as_plain_data(plan.to_dict())

    def around_saving(
        self, strategy: Strategy, proceed: Callable[..., Any], checkpoint: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Put the plan into a checkpoint, and see to it that a whole one is under its name, or none."""
        self.before_saving(strategy.lightning_module, checkpoint)
        if loads_weights_with_file(strategy):
            agree_on_plan(strategy, checkpoint)
        return write_whole(strategy, proceed, checkpoint, *args, **kwargs)


def _module_of(strategy: Strategy) -> pl.LightningModule:
    module = strategy.lightning_module
    assert module is not None
    return module


def _training_step(batch: Any, batch_idx: int) -> Step:
    return lambda run: run.training_step(batch, batch_idx)


def _refuse_pruning(trainer: pl.Trainer) -> None:
    if any(isinstance(callback, classes("callbacks.ModelPruning")) for callback in callbacks_of(trainer)):
        raise UnitScalingError(
            "ModelPruning compares the magnitudes of stored weights, which unit scaling rescales layer by layer: it "
            "would empty layers that are merely stored small. Use scheme='preserve', or prune the trained model after "
            "remove_unit_scaling(). Nothing was changed."
        )


def _announce(plan: Plan) -> None:
    rank_zero_info(headline(plan))
    if not plan.is_plain:
        rank_zero_info(
            "unit scaling: the weights in checkpoints of this model are its function only together with the plan "
            "beside them. Where lightning_unitscale is imported it is put in force as they are loaded; elsewhere they "
            "are refused."
        )
