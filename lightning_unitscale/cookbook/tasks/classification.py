"""Choosing one of several classes, for texts or images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_unitscale.cookbook.data.examples import Batch
from lightning_unitscale.cookbook.tasks.fine_tuning import FineTuning


class MajorityAccuracy(Metric):
    """What accuracy is worth more than: that of always answering the most frequent of the labels seen."""

    counts: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Counts the labels [batch]; the logits are not looked at."""
        self.counts += torch.bincount(labels, minlength=len(self.counts))

    def compute(self) -> Tensor:
        """The share of the most frequent label."""
        return self.counts.max() / self.counts.sum()


class Classification(FineTuning):
    """Batches: inputs of the model, and labels [batch]. The model's config says how many classes there are."""

    heads = ("AutoModelForSequenceClassification", "AutoModelForImageClassification")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        classes = self.model.config.num_labels
        self.metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "majority_class_accuracy": MajorityAccuracy(classes),
                "f1": MulticlassF1Score(classes, average="macro"),
            },
            compute_groups=False,
        )

    def score(self, batch: Batch, output: Any) -> None:
        """Accuracy, that of the most frequent class, and the mean of the classes' F1."""
        self.metrics.update(output.logits, batch["labels"])

    def scores(self) -> dict[str, Tensor]:
        """Accuracy, that of the most frequent class, and the mean of the classes' F1."""
        values: dict[str, Tensor] = self.metrics.compute()
        return values
