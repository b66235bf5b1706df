"""The `UnitScaling` callback: unit scaling for the model of any Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.lifecycle import Lifecycle
from lightning_unitscale.namespaces import Callback, callbacks_of
from lightning_unitscale.near_names import suggests_arguments
from lightning_unitscale.options import RECALIBRATE, Options
from lightning_unitscale.strategy import UnitScalingMixin

if TYPE_CHECKING:
    import pytorch_lightning as pl


class UnitScaling(Callback):
    """Trains an unmodified LightningModule with unit scaling: `Trainer(callbacks=[UnitScaling()])`.

    On the first training batch the module's step is rehearsed on that batch, forward only and leaving no trace, to
    see which parameters it has and how they are used. From that comes the plan, which is put in force before the
    step is taken. Learning rates are multiplied inside the optimizer's step; your groups, schedulers and loggers
    keep your values.

    Args:
        scheme: "umup" (u-μP, for training from scratch; arXiv 2407.17465), "unit" (Unit Scaling, 2303.11257), "mus"
            (µnit Scaling, 2502.05967), "completep" (CompleteP, 2505.01618), "amax" (tensors divided by max|t|/√n, see
            `schemes.amax`) or "preserve" (the model's own function and training, for pretrained models).
        format: what the operands of every matmul with a parameter are cast to, each times one power of two: "fp8"
            (e4m3, gradients e5m2), "fp8_e4m3" (gradients too), "fp8_rowwise" (a power for each row), "fp16",
            "bf16", emulated "mxfp8" and "nvfp4" (but for readouts; see `block_formats`), or None for no casts. Measured
            on the first step, in which nothing is cast yet; see `formats`.
        storage: where constants are kept. "folded": in the stored weights, so that the model stays a plain module
            with plain checkpoints and no cost per step; what can't be folded stays a site. "unit": weights are
            stored at RMS 1 and all constants are explicit in the forward pass. Both train identically.
        weights: scale weights: initial values, matmul factors, learning rates.
        activations: scale activations: attention logits, activation functions, residual branches.
        gradients: scale gradient operands, and the loss where gradients are in FP16 on their way; of use with a
            `format` only. (`weights` and `activations` switch the scales of these operands too.) Under "amax" also
            whether the optimizer sees divided gradients.
        lr_units: "standard": your learning rate means what it meant for the unscaled model. "umup": it is the scheme's
            η (u-μP's is about 1), and carries over between the sizes that the scheme has rules for.
        skip: globs of module or parameter names to leave alone.
        overrides: {glob: {"role": …, "multiplier": …, "lr_multiplier": …, "format": …, "skip": …}} for parameters by
            name. "attention_format", as in {"*.self_attn": {"attention_format": "fp8"}}, is for modules: it casts the
            operands of attention's own products too, of those that the named modules' code calls (`"*"` for all): q,
            k and v of `F.scaled_dot_product_attention`, both operands of `q @ k.mT` and of `probabilities @ v`, and
            the gradients that come back to them. Numerics alone, at no gain in speed; see `engine.runtime.casts`.
        hyperparameters: {name: value} of the scheme, such as {"alpha_attn": 2.0}; `schemes/README.md` lists those of
            each. Where `overrides` name one, as in {"*.layers.0.*": {"alpha_res": 0.5}}, it holds for what the named
            modules and parameters make: weights, attention, activations, and branches that have one of them.
        recalibrate: steps at which operand scales are measured again; of use with a `format` only.
        verify: check the plan on the first batch before training starts, see `engine.checks.verify`.
        optimizer_family: "adam", "sgd", "muon" …, for an optimizer class of which unit scaling does not know how its
            step answers to the gradient's scale, see `optimizer_family`.

    Attributes:
        plan: the plan in force, from the first training step on; None before.

    Raises:
        UnitScalingError: an option is wrong (at once); nothing in the model can be scaled, its first loss is not
            finite, or a checkpoint does not fit (when training starts).
    """

    @suggests_arguments
    def __init__(
        self,
        scheme: str = "umup",
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
        optimizer_family: str | None = None,
    ) -> None:
        self.unit_scaling = Lifecycle(
            Options(
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
            ),
            optimizer_family,
        )

    @property
    def plan(self) -> Plan | None:
        """The plan in force, from the first training step on."""
        return self.unit_scaling.plan

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Connect to the Trainer's strategy."""
        if sum(isinstance(callback, UnitScaling) for callback in callbacks_of(trainer)) > 1:
            raise UnitScalingError("the Trainer has more than one UnitScaling callback; keep one of them.")
        strategy = trainer.strategy
        if not isinstance(strategy, UnitScalingMixin):
            self.unit_scaling.wrap(strategy)
        elif strategy.unit_scaling is not self.unit_scaling:
            ours, theirs = self.unit_scaling, strategy.unit_scaling
            if theirs.settings not in (ours.settings, (Options(), None)):
                raise UnitScalingError(
                    "the UnitScaling callback and the strategy were given different options; give them to one of the "
                    "two."
                )
            theirs.settings = ours.settings
            self.unit_scaling = theirs
        self.unit_scaling.before_run(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a measured step: cast operands with the scales that were found."""
        self.unit_scaling.after_train_batch(pl_module, batch, batch_idx)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the plan beside the weights."""
        self.unit_scaling.before_saving(pl_module, checkpoint)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Undo what `setup` did; the model keeps its plan."""
        self.unit_scaling.after_run()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Undo what `setup` did: Lightning does not call `teardown` after an exception."""
        self.unit_scaling.release()
