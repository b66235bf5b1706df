"""What every job is: a small model with its data, its loss, and a score on data that it was not trained on.

A job knows nothing of unit scaling. Its data do not depend on the seed; its weights, the order of its batches and the
noise that its loss draws do.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset
from torchmetrics import MeanMetric

from lightning_unitscale.cookbook.learning_rate_schedule import warm_up_and_decay
from lightning_unitscale.cookbook.optimizers import new_optimizer

Batch = Sequence[Tensor]


class Job(pl.LightningModule):
    """A problem of one kind. A subclass builds its layers in `__init__`, and says what data and loss are.

    Args:
        width: number of features; the knob of `unitscale coord_check`.
        depth: number of blocks of each residual stream.
        steps: optimizer steps that it is trained for.
        batch_size: examples a step.
        optimizer: a class under `_target_`, and its arguments.
        schedule: arguments of `warm_up_and_decay`; empty for a constant learning rate.

    Attributes:
        branch_outputs: globs of the modules whose output a residual stream adds, which the usual initialisations make
            smaller in deep models.
        kept: globs of the parameters whose initial values belong to the model's design, whatever the others'.
    """

    branch_outputs: ClassVar[tuple[str, ...]] = ()
    kept: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        width: int,
        depth: int,
        steps: int,
        batch_size: int,
        optimizer: Mapping[str, Any],
        schedule: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.width, self.depth, self.steps, self.batch_size = width, depth, steps, batch_size
        self.optimizer, self.schedule = optimizer, schedule
        self.held_out = MeanMetric()

    @abstractmethod
    def examples(self) -> tuple[Tensor, ...]:
        """All data, each tensor [examples, …]; the last `held_out_examples` are held out."""

    held_out_examples: ClassVar[int] = 256

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """What is trained: the mean over a batch."""

    def score(self, batch: Batch) -> Tensor:
        """What is measured on held-out data: a mean over the batch, the lower the better; by default the loss.

        Random numbers are those of seed 0, whatever the run's.
        """
        return self.loss(batch)

    # --- Lightning ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One batch."""
        return self.loss(batch)

    def on_validation_epoch_start(self) -> None:
        """Begin the mean anew."""
        self.held_out.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """One batch of held-out data."""
        with torch.random.fork_rng():
            torch.manual_seed(batch_idx)
            self.held_out.update(self.score(batch), weight=len(batch[0]))

    def on_validation_epoch_end(self) -> None:
        """Log the score as val/score."""
        self.log("val/score", self.held_out.compute())

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches drawn with replacement, as many as there are steps."""
        data = TensorDataset(*(tensor[: -self.held_out_examples] for tensor in self.examples()))
        drawn = RandomSampler(data, replacement=True, num_samples=self.steps * self.batch_size)
        return _batches(data, BatchSampler(drawn, self.batch_size, drop_last=True))

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out data in their order."""
        data = TensorDataset(*(tensor[-self.held_out_examples :] for tensor in self.examples()))
        return _batches(data, BatchSampler(SequentialSampler(data), 128, drop_last=False))

    def configure_optimizers(self) -> Any:
        """The configured optimizer over all parameters, its learning rate rising, then falling linearly."""
        return self.with_schedule(self.parameters())

    def with_schedule(self, parameters: Any) -> Any:
        """An optimizer over these parameters, as `configure_optimizers` returns it."""
        optimizer = new_optimizer(self.optimizer, self, parameters)
        if not self.schedule:
            return optimizer
        scheduler = warm_up_and_decay(optimizer, **self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _batches(data: Dataset[Any], batches: BatchSampler) -> DataLoader[Any]:
    """A batch is one look-up in the tensors, not a look-up for each example and a stack of them."""
    return DataLoader(data, sampler=batches, batch_size=None)
