"""What every task is: an ordinary LightningModule around any model of transformers, with its data and its answers.

It knows nothing of unit scaling, and all its arguments are plain containers, so a checkpoint alone rebuilds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import pytorch_lightning as pl
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, Metric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_unitscale.cookbook.adapters import with_adapter
from lightning_unitscale.cookbook.data.examples import Batch
from lightning_unitscale.cookbook.heads import new_model
from lightning_unitscale.cookbook.learning_rate_schedule import warm_up_and_decay
from lightning_unitscale.cookbook.optimizers import new_optimizer
from lightning_unitscale.cookbook.pretrained import Pretrained
from lightning_unitscale.cookbook.spreading import spread
from lightning_unitscale.cookbook.tokenizers import load_tokenizer
from lightning_unitscale.errors import InputError
from lightning_unitscale.export import example_inputs
from lightning_unitscale.near_names import matches, near_glob


class Task(pl.LightningModule):
    """Trains a model on the loss that it computes itself; batches are its arguments, with all that its loss needs.

    A task of one's own is a subclass in one file and an option of the group `task` (see conf/README.md). What may be
    changed, in the order in which it is used: `check`, `classes`, `data_module`, `output`, `loss`, `count`,
    `score` and `scores`, `test_score` and `test_scores`,
    `predict_step` (with `predicts_held_out`) and `collate_texts`, `show`, `example_inputs`.

    Args:
        model: its config: model_type, and arguments of the config class.
        head: auto class of transformers; default: the first of `heads`.
        optimizer: `_target_` and arguments.
        schedule: arguments of `warm_up_and_decay`.
        tokenizer: "bytes", a path or a hub name; None for models without text.
        freeze: globs of parameters, or of modules, that are not trained; names as in `model.named_parameters()`.
        lora: arguments of `peft.LoraConfig`; then only its layers are trained.
        base: path or hub name of the model that fine-tuning began with, which an adapter's config is to name; "" where
            it began with random weights, None for pre-training.
        weights: a model to be used, in place of a new one with random weights.

    Attributes:
        heads: the auto classes that the task is for; None for any.
        counted: what `count` counts.
        shows_scores: whether the progress bar has the scores too.
        predicts_held_out: whether `predict_step` takes the batches of the task's own data. It returns a list or tensor
            with one entry for each example, or a dict of those: the columns of the file that is written.
        not_saved: arguments that are no part of a checkpoint's settings.

    Raises:
        InputError: a glob of `freeze` matches nothing, or nothing is left to train.
    """

    heads: tuple[str, ...] | None = None
    counted = "examples"
    shows_scores = True
    predicts_held_out = False
    not_saved: ClassVar[tuple[str, ...]] = ("weights",)

    def __init__(
        self,
        model: dict[str, Any],
        head: str | None = None,
        optimizer: dict[str, Any] | None = None,
        schedule: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        freeze: Sequence[str] = (),
        lora: dict[str, Any] | None = None,
        base: str | None = None,
        weights: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=list(self.not_saved))
        built: Any = weights if weights is not None else new_model(model, head or (self.heads or ("AutoModel",))[0])
        freeze_parameters(built, freeze)
        built.name_or_path = base or ""
        self.model: Any = with_adapter(built, lora) if lora else built
        self.tokenizer: Any = load_tokenizer(tokenizer) if tokenizer else None
        self.optimizer = optimizer
        self.schedule = schedule
        self.held_out_loss = MeanMetric()

    def configure_model(self) -> None:
        """Under a strategy with a mesh of processes (`trainer=fsdp2`, …) the model is spread over them, once."""
        mesh = self.device_mesh
        if mesh is not None and not any(isinstance(parameter, DTensor) for parameter in self.model.parameters()):
            spread(self.model, mesh)

    # --- data -------------------------------------------------------------------------------------------------------

    @classmethod
    def check(cls, cfg: DictConfig) -> None:
        """
        Raises:
            InputError: a setting of the group `task` would fail late or obscurely, or a package is missing.
        """

    @classmethod
    def classes(cls, examples: Any) -> list[str]:
        """The classes that the head is to tell apart; none where it has no classes."""
        return []

    @classmethod
    def data_module(cls, examples: Any, found: Pretrained, cfg: DictConfig) -> pl.LightningDataModule:
        """Batches for training, validation and test.

        Args:
            examples: what `data.<task.data>` gives; here a data module of the user's own.
            found: the model that they are for, with its tokenizer.
            cfg: the run's configuration; `cfg.task` and `cfg.data` hold the settings.
        """
        data: pl.LightningDataModule = examples
        return data

    @classmethod
    def complete(cls, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel) -> None:
        """Gives a model that is loaded what this task needs beside its weights and tokenizer."""

    # --- training and scores ----------------------------------------------------------------------------------------

    def output(self, model: nn.Module, batch: Batch) -> Any:
        """What a model makes of a batch: the task's own, or a teacher."""
        return model(**batch)

    def loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """The loss, a mean over what `count` counts, and the model's output.

        Raises:
            InputError: the model gives none for such a batch.
        """
        output = self.output(self.model, batch)
        if getattr(output, "loss", None) is None:
            raise InputError(
                f"{self.hparams['head']} computes no loss from a batch of {', '.join(batch)}: it is no head for "
                "training, or the labels that it wants are not in the data"
            )
        return output.loss, output

    def count(self, batch: Batch) -> Tensor | int:
        """How many numbers the loss is a mean of; heads without `labels` (answers to questions) take one an example."""
        return (batch["labels"] >= 0).sum() if "labels" in batch else _examples(batch)

    def logits(self, batch: Batch, output: Any) -> Tensor:
        """The predictions that the loss counts, [labels, classes]: what a student learns of a teacher.

        Raises:
            InputError: the model has not one row of logits for each label.
        """
        logits, labels = getattr(output, "logits", None), batch.get("labels")
        if not isinstance(logits, Tensor) or labels is None or logits.shape[:-1] != labels.shape:
            raise InputError(
                f"{type(self.model).__name__} has not one row of logits a label, so there is no teaching it"
            )
        return logits[labels >= 0]

    def score(self, batch: Batch, output: Any) -> None:
        """Update the task's own metrics."""

    def scores(self) -> dict[str, Tensor]:
        """Name -> value of the task's own metrics over all batches."""
        return {}

    def test_score(self, batch: Batch) -> None:
        """Update metrics that the test alone has, such as those of generated texts."""

    def test_scores(self) -> dict[str, Tensor]:
        """Name -> value of the metrics that the test alone has."""
        return {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One batch."""
        loss, _ = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=_examples(batch))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss, and the task's own scores."""
        loss, output = self.loss(batch)
        self.held_out_loss.update(loss, weight=self.count(batch))
        self.score(batch, output)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As for validation, and the scores of the test alone."""
        self.validation_step(batch, batch_idx)
        self.test_score(batch)

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
        self._log_scores("test", self.test_scores())

    def _log_scores(self, part: str, more: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        self.log(f"{part}/loss", self.held_out_loss.compute(), prog_bar=True, sync_dist=True)
        scores = {f"{part}/{name}": value for name, value in {**self.scores(), **more}.items()}
        self.log_dict(scores, prog_bar=self.shows_scores, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """The configured optimizer, over what is trained; its learning rate rises linearly, then falls linearly."""
        optimizer = new_optimizer(self.optimizer or {}, self, (p for p in self.parameters() if p.requires_grad))
        scheduler = warm_up_and_decay(optimizer, **(self.schedule or {}))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- answers ----------------------------------------------------------------------------------------------------

    def collate_texts(self, texts: Sequence[str], generation: Mapping[str, Any]) -> Callable[[list[str]], Any]:
        """What makes a batch for `predict_step` of texts that are no examples of the task's data.

        Args:
            texts: all of them, to be looked at before the first is predicted.
            generation: settings of transformers' GenerationConfig, for tasks that write text.

        Raises:
            InputError: the model has nothing to say about texts, or one of them does not fit it.
        """
        raise InputError(f"{type(self.model).__name__} neither writes text nor has classes for whole texts")

    def files_of(self, texts: Sequence[str], folder: Path) -> list[Path]:
        """Files beside the table of predictions: what the model makes of each text, where that is to be heard or seen.

        Args:
            texts: as for `collate_texts`.
            folder: made where there is something to write.
        """
        return []

    def show(self, batches: DataLoader[Any], folder: Path, settings: Mapping[str, Any]) -> list[str | Path]:
        """What the model does with some held-out examples, as a person would look at it.

        Args:
            batches: of the task's data.
            folder: where pictures, sounds and other files go; it is there.
            settings: those of the group `task`.

        Returns:
            Texts, and paths of the files, in the order in which they are to be looked at.
        """
        return []

    example_inputs = staticmethod(example_inputs)  # what an export of the model is traced with and checked on


def _examples(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def freeze_parameters(model: nn.Module, globs: Sequence[str]) -> None:
    """Stop the training of every parameter that a glob matches, by its own name or that of a module it belongs to.

    Raises:
        InputError: a glob matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for glob in globs:
        if not any(matches(name, (glob,)) for name in names):
            raise InputError(f"model.freeze: {glob!r} matches no parameter and no module. {near_glob(glob, names)}")
    for name, parameter in model.named_parameters():
        if matches(name, globs):
            parameter.requires_grad_(False)
    if globs and not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("model.freeze leaves nothing to train; leave out the head, or a layer")
