"""The `ScaleMonitor` callback: what a training model's matmul operands are like, every so many steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.errors import InputError
from lightning_unitscale.monitor.loggers import log_figure, log_to
from lightning_unitscale.monitor.probes import Probes, check_format, plan_scales
from lightning_unitscale.monitor.scalars import for_progress_bar
from lightning_unitscale.monitor.snapshot import FILE, Snapshot
from lightning_unitscale.monitor.updates import copies_of, updates_since
from lightning_unitscale.namespaces import Callback
from lightning_unitscale.near_names import suggests_arguments
from lightning_unitscale.warn_user import warn_user

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning.strategies import Strategy

_WATCHED = ("training_step", "backward")  # backward for reentrant checkpointing, which runs the forward pass there


class ScaleMonitor(Callback):
    """Measures operands every n optimizer steps: `Trainer(callbacks=[ScaleMonitor()])`, with `UnitScaling` or alone.

    For the activation x, the weight and the incoming gradient of every matmul with a parameter: RMS, largest absolute
    value, spread over the powers of two; and of a cast to a narrow format, the share of elements that it flushes to
    zero or saturates, and its signal-to-noise ratio, both as they are and times the site's operand scale. Summaries go
    to every logger under `unitscale/…`, everything to `monitor.jsonl`, from which `unitscale report` draws its charts.
    The progress bar shows the lowest signal-to-noise ratio of a cast (`snr_db`) and the largest share of an operand
    that one loses (`lost_%`); where nothing is cast, the share of activations with an RMS within a factor 4 of 1
    (`x_near_1_%`).

    Of every parameter, the size of the step's update relative to it, and of linear layers how far the update is aligned
    with their input (`monitor.updates`): for this the measured step keeps a copy of the weights.

    The measured step runs uncompiled; all micro-batches of an accumulated step count. Between measured steps nothing is
    installed anywhere. Under several processes all measure their share of the batch, and rank 0 sums up and writes
    (inputs for alignments are its own). Gradients are measured as they flow, times a loss scale where there is one.

    Args:
        every_n_steps: 50 measures the steps 0, 50, 100, … and the last one of `max_steps`.
        format: as for `UnitScaling`; None for the one that the plan casts to, or fp8 where it casts nothing.
        folder: where `monitor.jsonl` is kept, and gone on with when a run is resumed; by default the first logger's.
        details: log every site and operand by name, not the summary alone.
        figures: give TensorBoard and Weights & Biases the chart of exponents at the end; needs matplotlib.

    Attributes:
        last: the latest snapshot; None before there is one.
        file: where snapshots are kept, from the start of `fit` on.

    Raises:
        InputError: an argument is wrong (at once), or matplotlib is missing.
    """

    @suggests_arguments
    def __init__(
        self,
        every_n_steps: int = 50,
        format: str | None = None,
        folder: str | Path | None = None,
        details: bool = False,
        figures: bool = False,
    ) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise InputError(f"every_n_steps={every_n_steps!r} must be a positive whole number")
        self.every_n_steps, self.details, self.figures = every_n_steps, details, figures
        self.format = None if format is None else check_format(format)
        self.folder = folder
        self.last: Snapshot | None = None
        self.file = Path()
        self._next = 0  # the optimizer step that is measured next
        self._begun: int | None = None  # the one that is being measured
        self._probes: Probes | None = None  # its sums
        self._before: dict[str, Tensor] = {}  # the parameters before it
        self._watched: Strategy | None = None
        if figures:
            _check_matplotlib()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the folder."""
        folder = self.folder or trainer.log_dir or trainer.default_root_dir  # asked for on every process
        self.file = Path(folder) / FILE

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the first step to measure."""
        self._next = -(-trainer.global_step // self.every_n_steps) * self.every_n_steps

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch this batch if its step is due."""
        step = trainer.global_step
        if self._begun is None and (step >= self._next or step == trainer.max_steps - 1):
            self._begun = step
        if self._begun is not None:
            self._watch(trainer.strategy)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop watching; when the step has been taken, log what was seen."""
        self._release()
        if self._begun is not None and trainer.global_step > self._begun:
            self._finish(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the charts to the loggers that take figures."""
        self._release()
        self._begun, self._probes = None, None
        if self.figures and trainer.is_global_zero:
            from lightning_unitscale.monitor.charts import exponent_chart

            snapshots = Snapshot.read(self.file)
            for logger in trainer.loggers if snapshots else []:
                chart = exponent_chart([snapshots[0], snapshots[-1]])  # TensorBoard closes the one that it is given
                log_figure(logger, "unitscale/exponents", chart, trainer.global_step)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._release()
        self._begun, self._probes = None, None

    # --- a measured step ----------------------------------------------------------------------------------------------

    def _watch(self, strategy: Strategy) -> None:
        """Observe inside the strategy's step alone: the rehearsal of `UnitScaling`, which comes before, is not seen."""
        self._release()  # a batch that `on_train_batch_start` had skipped
        self._watched = strategy
        for name in _WATCHED:
            setattr(strategy, name, self._observed(strategy, getattr(strategy, name)))

    def _observed(self, strategy: Strategy, method: Callable[..., Any]) -> Callable[..., Any]:
        def observe(*args: Any, **kwargs: Any) -> Any:
            if self._probes is None:
                self._probes = self._new_probes(strategy.lightning_module)
            with torch.compiler.set_stance("force_eager"), self._probes.observer:
                return method(*args, **kwargs)

        vars(observe)["__wrapped__"] = method
        return observe

    def _new_probes(self, module: Any) -> Probes:
        plan = plan_of(module)
        casts = [site.format for site in plan.cast_sites if site.format] if plan is not None else []
        self._before = copies_of(module)
        return Probes(module, self.format or (casts[0] if casts else "fp8"), plan_scales(plan))

    def _release(self) -> None:
        if self._watched is None:
            return
        for name in _WATCHED:
            observe = self._watched.__dict__.pop(name, None)
            method = getattr(observe, "__wrapped__", None)
            if method is None:
                continue  # `UnitScaling` gave the strategy its own methods back first
            if getattr(method, "__func__", None) is not getattr(type(self._watched), name):
                setattr(self._watched, name, method)  # another's, that was there before
        self._watched = None

    def _finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert self._begun is not None
        step, probes, before = self._begun, self._probes, self._before
        self._next = (step // self.every_n_steps + 1) * self.every_n_steps
        self._begun, self._probes, self._before = None, None, {}
        if probes is None:
            return
        plan = plan_of(module)
        updates = updates_since(before, module, probes.linear_inputs(), plan.roles if plan is not None else {})
        probes.observer.forget_parameters()
        probes.include_other_processes()
        if not trainer.is_global_zero:
            return
        self.last = probes.snapshot("run", step, updates)
        if not self.last.measurements:
            warn_user(
                "ScaleMonitor has seen no product with a parameter in a step: nothing was measured. Under FSDP1 and "
                "DeepSpeed's ZeRO 3 others run in the place of parameters; watch a run on one device, or take "
                "FSDP2 (ModelParallelStrategy and fully_shard)."
            )
            return
        self.last.append_to(self.file)
        for logger in trainer.loggers:
            log_to(logger, self.last, trainer.fit_loop.epoch_loop._batches_that_stepped, self.details)
        for name, value in for_progress_bar(self.last, asked=self.format is not None).items():
            module.log(name, value, prog_bar=True, logger=False, on_step=True, on_epoch=False, rank_zero_only=True)


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(
            "figures=True needs matplotlib: pip install 'lightning-unitscale[recipes]', or leave figures=False"
        ) from error
