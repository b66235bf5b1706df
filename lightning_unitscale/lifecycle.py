"""Unit scaling inside a Lightning Strategy, where it sees the first real batch and every checkpoint.

`TrainerScaling` is the one implementation. A named strategy (`UnitScalingMixin`) calls it from its overridden methods;
the callback alone wraps the same few methods on the instance of whatever strategy the Trainer has.

When what happens:

    before the run           a compiled LightningModule's `log` is kept out of the compiler
    load_model_state_dict    a checkpoint's plan is put in force before its weights are loaded
    on_train_batch_start     no plan yet: the step is rehearsed on this batch and the plan put in force; optimizers
                             get their learning-rate multipliers
    backward                 starts from the loss scale where gradients travel in FP16
    on_train_batch_end       after a measured step, operands are cast with the scales that were found
    save_checkpoint          the plan is saved beside the weights
    teardown, on_exception   strategy, optimizers and `log` are as before; the model keeps its plan
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_unitscale.checkpoint import as_plain_data, plan_in, prepare_for_loading
from lightning_unitscale.engine.checks.calibration import Calibration, check_device, fall_back
from lightning_unitscale.engine.checks.verify_casts import verify_casts
from lightning_unitscale.engine.plan.plan import Plan, plan_of
from lightning_unitscale.engine.plan.state_dict import PLAN_KEY
from lightning_unitscale.engine.plan.summary import headline
from lightning_unitscale.engine.runtime.install import rescale_parameters
from lightning_unitscale.errors import NoLossError, UnitScalingError
from lightning_unitscale.loss_scale import LossScale, find_loss_scale, needs_loss_scale
from lightning_unitscale.optim.families import FAMILIES, optimizer_family
from lightning_unitscale.optim.scaled_step import ScaledStep, scale_learning_rates
from lightning_unitscale.options import Options
from lightning_unitscale.prepare import Step, adopt, forget, prepare, put_in_force
from lightning_unitscale.schemes import find

LARGE_DECAY = 0.02  # of a weight in one step; AdamW's usual lr · weight_decay is below 1e-3
SMALL_LEARNING_RATE = 0.02  # in u-μP units, where about 1 is usual (u-μP, arXiv 2407.17465, figure 1)
_BEFORE = {"on_train_batch_start": "before_train_batch", "load_model_state_dict": "before_loading"}
_AROUND = {"backward": "around_backward", "optimizer_step": "around_optimizer_step"}
# The options that decide what a plan says.
_OF_THE_PLAN = ("scheme", "format", "storage", "lr_units", "weights", "activations", "gradients", "skip", "overrides")


class TrainerScaling:
    """Unit scaling of one Trainer's model.

    Args:
        options: what to do.
        optimizer_family: "adam" | "sgd" | "muon" for optimizer classes that `optimizer_family` does not know.
    """

    def __init__(self, options: Options, optimizer_family: str | None = None) -> None:
        if optimizer_family is not None and optimizer_family not in FAMILIES:
            raise UnitScalingError(
                f"optimizer_family={optimizer_family!r} is not known; choose one of {', '.join(map(repr, FAMILIES))}."
            )
        self.scheme = find(options.scheme)
        self.options = options
        self.optimizer_family = optimizer_family
        self.plan: Plan | None = None
        self._steps: dict[int, tuple[Optimizer, Plan, ScaledStep]] = {}  # holds the optimizers, so ids stay theirs
        self._calibration: Calibration | None = None
        self._loss_scale: LossScale | None = None
        self._wrapped: Strategy | None = None
        self._uncompiled: pl.LightningModule | None = None
        self._without_loss: NoLossError | None = None

    @property
    def settings(self) -> tuple[Options, str | None]:
        """All that it was told."""
        return self.options, self.optimizer_family

    def wrap(self, strategy: Strategy) -> None:
        """Take over the methods of a strategy instance that is not a `UnitScalingMixin`."""
        if self._wrapped is not strategy:
            for name, ours in _BEFORE.items():
                setattr(strategy, name, _Wrapper(getattr(self, ours), strategy, name, around=False))
            for name, ours in _AROUND.items():
                setattr(strategy, name, _Wrapper(getattr(self, ours), strategy, name, around=True))
            self._wrapped = strategy

    def release(self) -> None:
        """Give strategy, optimizers and module their own methods back; the model keeps its plan."""
        if self._wrapped is not None:
            for name in (*_BEFORE, *_AROUND):
                wrapper = self._wrapped.__dict__.pop(name, None)
                while wrapper is not None and not isinstance(wrapper, _Wrapper):  # one that was put around ours
                    wrapper = getattr(wrapper, "__wrapped__", None)
                if isinstance(wrapper, _Wrapper) and wrapper.replaced is not None:
                    setattr(self._wrapped, name, wrapper.replaced)
            self._wrapped = None
        if self._uncompiled is not None:
            self._uncompiled.__dict__.pop("log", None)
            self._uncompiled = None
        for _, _, step in self._steps.values():
            step.remove()
        self._steps.clear()
        if self._calibration is not None:
            self._calibration.abort()
            self._calibration = None
        if self._loss_scale is not None:
            self._loss_scale.remove()
            self._loss_scale = None

    def after_run(self) -> None:
        """Leave the strategy as it was.

        Raises:
            NoLossError: there were batches, and none had a loss to prepare the model with.
        """
        self.release()
        error, self._without_loss = self._without_loss, None
        if error is not None:
            raise error

    def before_run(self, module: pl.LightningModule) -> None:
        """Keep `log` of a compiled LightningModule out of the compiler, which it crashes (torch 2.12, 2.13)."""
        if getattr(module, "_compiler_ctx", None) is not None and "log" not in module.__dict__:
            module.__dict__["log"] = torch.compiler.disable(module.log)
            self._uncompiled = module

    def before_train_batch(self, strategy: Strategy, batch: Any, batch_idx: int) -> None:
        """Prepare the model if it is not, and give every optimizer its multipliers."""
        module = strategy.lightning_module
        assert module is not None
        plan = self._plan_to_go_on_with(module)
        if plan is None:
            if self.options.scheme != "preserve":
                for optimizer in strategy.optimizers:
                    self._family(optimizer)  # before anything is changed
            try:
                plan = prepare(
                    module,
                    lambda run: run.training_step(batch, batch_idx),
                    self.options,
                    module.trainer,
                    agree=lambda plan: strategy.broadcast(plan, src=0),
                )
            except NoLossError as error:
                if module.trainer.world_size > 1:  # another process may have a loss, and waits for this one
                    raise
                if self._without_loss is None:
                    warnings.warn(
                        f"unit scaling: the step on batch {batch_idx} gives no loss; the model stays as it is until a "
                        "batch has one.",
                        stacklevel=2,
                    )
                self._without_loss = error
                return
            rank_zero_info(headline(plan))
            if not plan.is_plain:
                rank_zero_info(
                    "unit scaling: the weights in checkpoints of this model are its function only together with the "
                    "plan beside them. Where lightning_unitscale is imported it is put in force as they are loaded; "
                    "elsewhere they are refused."
                )
            for average in _averages(module.trainer):
                rescale_parameters(average, plan)
                put_in_force(average, Plan.from_dict(plan.to_dict()))
        elif plan is not self.plan:
            self._check_options(plan)
        self.plan, self._without_loss = plan, None
        if plan.scheme != "preserve" or any(p.lr_override is not None for p in plan.parameters.values()):
            for optimizer in strategy.optimizers:
                self._scale_steps(optimizer, plan, module)
        if self.options.format == "fp16" and self.options.gradients and self._loss_scale is None:
            self._scale_loss(strategy, module, plan, lambda run: run.training_step(batch, batch_idx))
        if self._calibration is None or self._calibration.plan is not plan:
            check_device(module, plan)
            self._calibration = Calibration(module, plan, self.options.recalibrate)
        if self._calibration.step is None and self._calibration.due(module.trainer.global_step):
            self._calibration.begin(module.trainer.global_step)

    def after_train_batch(self, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Once a measured step is complete, cast with what it showed; the first time, check the casts."""
        calibration, trainer = self._calibration, module.trainer
        if calibration is None or calibration.step is None or trainer.global_step <= calibration.step:
            return
        first = not calibration.plan.measured_at
        calibration.finish()
        if first and self.options.verify:
            problems = verify_casts(module, calibration.plan, lambda run: run.training_step(batch, batch_idx), trainer)
            for use, problem in trainer.strategy.broadcast(problems, src=0).items():
                fall_back(module, calibration.plan, use, problem)

    def _scale_loss(self, strategy: Strategy, module: pl.LightningModule, plan: Plan, step: Step) -> None:
        """Give losses a scale if gradients travel in FP16 and no GradScaler sees to it."""
        if not needs_loss_scale(module) or getattr(strategy.precision_plugin, "scaler", None) is not None:
            return
        if plan.loss_scale is None:
            plan.loss_scale = strategy.broadcast(find_loss_scale(module, step, module.trainer), src=0)
        self._loss_scale = LossScale(module, plan.loss_scale)

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
        assert strategy.lightning_module is not None
        step = strategy.lightning_module.trainer.global_step

        def checked() -> Any:
            output = closure()
            scale.leave_out_overflow(optimizer, step)
            plan.loss_scale = scale.scale
            return output

        return proceed(optimizer, checked, *args, **kwargs)

    def _scale_steps(self, optimizer: Optimizer, plan: Plan, module: pl.LightningModule) -> None:
        _, known, _ = self._steps.get(id(optimizer), (None, None, None))
        if known is plan:
            return
        step = scale_learning_rates(optimizer, plan, module=module, family=self._family(optimizer))
        self._steps[id(optimizer)] = (optimizer, plan, step)
        if plan.lr_units == "umup":
            for group in optimizer.param_groups:
                _warn_of_units(group)

    def _family(self, optimizer: Optimizer) -> str:
        try:
            return optimizer_family(optimizer)
        except UnitScalingError as error:
            if self.optimizer_family is not None:
                return self.optimizer_family
            raise UnitScalingError(
                f"{error} With a Trainer, say it as UnitScaling(optimizer_family=…) or as the same argument of the "
                "strategy."
            ) from None

    def _plan_to_go_on_with(self, module: pl.LightningModule) -> Plan | None:
        """The plan in force, unless its weights alone are the function and `preserve` is to keep that."""
        models = [module, *_averages(module.trainer)]
        plan, *_ = [adopt(model) for model in models]
        if plan is None or plan is self.plan or not self._other_options(plan):
            return plan
        if self.options.scheme != "preserve" or not plan.is_plain:
            return plan
        for model in models:
            if plan_of(model) is not None:
                forget(model)
        return None

    def _other_options(self, plan: Plan) -> dict[str, tuple[Any, Any]]:
        """The options under which the plan was made and ours, where they differ."""
        theirs, ours = as_plain_data(plan.options), as_plain_data(self.options.to_dict())
        return {name: (theirs[name], ours[name]) for name in _OF_THE_PLAN if theirs.get(name, ours[name]) != ours[name]}

    def _check_options(self, plan: Plan) -> None:
        for name, (theirs, ours) in self._other_options(plan).items():
            raise UnitScalingError(
                f"the model (or its checkpoint) was prepared with {name}={theirs!r}, but UnitScaling has "
                f"{name}={ours!r}. Use the same, or start from an unprepared model."
            )

    def before_loading(self, strategy: Strategy, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put the checkpoint's plan in force before its weights are loaded.

        Raises:
            UnitScalingError: a run would be resumed under another scaling than it was trained with, or the plan is
                of another model.
        """
        module = strategy.lightning_module
        assert module is not None
        plan = plan_in(checkpoint)
        if module.trainer.state.fn == TrainerFn.FITTING:
            if plan is not None:
                self._check_options(plan)
            elif self.options.scheme != "preserve" and _is_of_a_run(checkpoint):
                raise UnitScalingError(
                    f"the checkpoint (step {checkpoint['global_step']}) was trained without unit scaling, and "
                    f"scheme={self.options.scheme!r} would change its weights and learning rates. Go on with "
                    "scheme='preserve', or load its weights as initial weights without ckpt_path."
                )
        for model in (module, *_averages(module.trainer)):
            prepare_for_loading(model, plan)

    def before_saving(self, module: pl.LightningModule | None, checkpoint: dict[str, Any]) -> None:
        """Put the plan into a checkpoint about to be written."""
        plan = plan_of(module) if module is not None else None
        if plan is not None:
            checkpoint[PLAN_KEY] = as_plain_data(plan.to_dict())


class _Wrapper:
    """A method of a strategy instance, run after ours or inside it; picklable, as a Trainer that spawns must be."""

    def __init__(self, ours: Callable[..., Any], strategy: Strategy, name: str, *, around: bool) -> None:
        self.ours, self.strategy, self.name, self.around = ours, strategy, name, around
        self.replaced = strategy.__dict__.get(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.around:
            return self.ours(self.strategy, self.proceed, *args, **kwargs)
        self.ours(self.strategy, *args, **kwargs)
        return self.proceed(*args, **kwargs)

    def proceed(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method that this one stands in for."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return getattr(type(self.strategy), self.name)(self.strategy, *args, **kwargs)


def _averages(trainer: pl.Trainer) -> Iterator[nn.Module]:
    """The copies of the model that averaging callbacks made before it was prepared, or before its weights are loaded.

    Lightning's WeightAveraging and StochasticWeightAveraging copy the module in `setup` and exchange weights with it
    later, so both must store the same; an average that was never updated holds the initial weights.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            yield average.module if isinstance(average, AveragedModel) else average


def _is_of_a_run(checkpoint: Mapping[str, Any]) -> bool:
    """Whether it has taken steps and can be resumed."""
    return bool(checkpoint.get("global_step", 0) > 0 and checkpoint.get("optimizer_states"))


def _warn_of_units(group: Mapping[str, Any]) -> None:
    """A learning rate or decay that would be usual in ordinary units, given in u-μP's."""
    lr = max(float(group.get(key) or 0.0) for key in ("lr", "initial_lr", "max_lr"))
    decay = lr * float(group.get("weight_decay") or 0.0)
    if lr < SMALL_LEARNING_RATE:
        warnings.warn(
            f"lr_units='umup' with a learning rate of {lr:g}: in u-μP units about 1 is usual (try 0.1 to 4), and below "
            f"{SMALL_LEARNING_RATE} a model hardly learns. For a learning rate with its ordinary meaning use "
            "lr_units='standard'.",
            stacklevel=2,
        )
    if decay > LARGE_DECAY:
        warnings.warn(
            f"lr_units='umup' with lr · weight_decay = {decay:g}: decoupled weight decay would take that share of each "
            "weight in each step. Divide weight_decay by what the learning rate grew by (1e-4 is usual at lr 1 to 2).",
            stacklevel=2,
        )
