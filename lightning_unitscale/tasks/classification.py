"""Choosing one of several classes, for texts or images."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_unitscale.data.examples import Batch
from lightning_unitscale.tasks.fine_tuning import FineTuning


class Classification(FineTuning):
    """Batches: inputs of the model, and labels [batch]. The model's config says how many classes there are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        classes = self.model.config.num_labels
        self.metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "f1": MulticlassF1Score(classes, average="macro"),
            },
            compute_groups=False,
        )

    def score(self, batch: Batch, output: Any) -> None:
        """Accuracy, and the mean of the classes' F1."""
        self.metrics.update(output.logits, batch["labels"])

    def scores(self) -> dict[str, Tensor]:
        """Accuracy, and the mean of the classes' F1."""
        values: dict[str, Tensor] = self.metrics.compute()
        return values
