"""What the tasks share: an ordinary LightningModule around any model of transformers.

It knows nothing of unit scaling, and all its arguments are plain containers, so a checkpoint alone rebuilds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import pytorch_lightning as pl
from hydra.utils import instantiate
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from lightning_unitscale.cookbook.data.examples import Batch
from lightning_unitscale.cookbook.pretrained import load_tokenizer, new_model, with_adapter
from lightning_unitscale.cookbook.schedule import warm_up_and_decay
from lightning_unitscale.errors import InputError


class FineTuning(pl.LightningModule):
    """Trains a model on the loss that it computes itself; batches are its arguments, with all that its loss needs.

    Args:
        model: its config: model_type, and arguments of the config class.
        head: auto class of transformers.
        optimizer: `_target_` and arguments.
        schedule: arguments of `warm_up_and_decay`.
        tokenizer: "bytes", a path or a hub name; None for models without text.
        freeze: globs of parameters, or of modules, that are not trained; names as in `model.named_parameters()`.
        lora: arguments of `peft.LoraConfig`; then only its layers are trained.
        base: path or hub name that an adapter's config is to name as what it belongs to.
        weights: a model to be used, in place of a new one with random weights.

    Attributes:
        heads: the auto classes that the task is for; None for any.

    Raises:
        InputError: a glob of `freeze` matches nothing, or nothing is left to train.
    """

    heads: tuple[str, ...] | None = None

    def __init__(
        self,
        model: dict[str, Any],
        head: str,
        optimizer: dict[str, Any],
        schedule: dict[str, Any],
        tokenizer: str | None = None,
        freeze: Sequence[str] = (),
        lora: dict[str, Any] | None = None,
        base: str = "",
        weights: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="weights")
        built: Any = weights if weights is not None else new_model(model, head)
        freeze_parameters(built, freeze)
        built.name_or_path = base
        self.model = with_adapter(built, lora) if lora else built
        self.tokenizer: Any = load_tokenizer(tokenizer) if tokenizer else None
        self.optimizer = optimizer
        self.schedule = schedule
        self.held_out_loss = MeanMetric()

    def loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """The loss, a mean over the labels, and the model's output.

        Raises:
            InputError: the model gives none for such a batch.
        """
        output = self.model(**batch)
        if getattr(output, "loss", None) is None:
            raise InputError(
                f"{self.hparams['head']} computes no loss from a batch of {', '.join(batch)}: it is no head for "
                "training, or the labels that it wants are not in the data"
            )
        return output.loss, output

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One batch."""
        loss, _ = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=_examples(batch))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss, and the task's own scores."""
        loss, output = self.loss(batch)
        self.held_out_loss.update(loss, weight=_labels(batch))
        self.score(batch, output)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As for validation."""
        self.validation_step(batch, batch_idx)

    def score(self, batch: Batch, output: Any) -> None:
        """Update the task's own metrics."""

    def scores(self) -> dict[str, Tensor]:
        """Name -> value of the task's own metrics over all batches."""
        return {}

    def on_validation_epoch_start(self) -> None:
        """Begin all metrics anew, here rather than at the end: what a test leaves can't be changed in training."""
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()

    def on_test_epoch_start(self) -> None:
        """As for validation."""
        self.on_validation_epoch_start()

    def on_validation_epoch_end(self) -> None:
        """Log as val/…."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log as test/…."""
        self._log_scores("test")

    def _log_scores(self, part: str) -> None:
        self.log(f"{part}/loss", self.held_out_loss.compute(), prog_bar=True, sync_dist=True)
        self.log_dict({f"{part}/{name}": value for name, value in self.scores().items()}, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """The configured optimizer, over what is trained; its learning rate rises linearly, then falls linearly."""
        optimizer = instantiate(self.optimizer, params=[p for p in self.parameters() if p.requires_grad])
        scheduler = warm_up_and_decay(optimizer, **self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _examples(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _labels(batch: Batch) -> Tensor | int:
    """How many numbers the loss is a mean of; heads without `labels` (answers to questions) take one an example."""
    return (batch["labels"] >= 0).sum() if "labels" in batch else _examples(batch)


def freeze_parameters(model: nn.Module, globs: Sequence[str]) -> None:
    """Stop the training of every parameter that a glob matches, by its own name or that of a module it belongs to.

    Raises:
        InputError: a glob matches nothing, or nothing is left to train.
    """
    unmatched = set(globs)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        owners = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        matching = {glob for glob in globs if any(fnmatchcase(owner, glob) for owner in owners)}
        unmatched -= matching
        if matching:
            parameter.requires_grad_(False)
    if unmatched:
        names = [name for name, _ in model.named_children()]
        raise InputError(
            f"model.freeze: {', '.join(sorted(unmatched))} matches no parameter and no module; the outermost "
            f"modules are {', '.join(names)}"
        )
    if globs and not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("model.freeze leaves nothing to train; leave out the head, or a layer")
