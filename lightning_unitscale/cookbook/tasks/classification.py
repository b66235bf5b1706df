"""What tasks share that choose one of several classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score
from transformers import PreTrainedConfig

from lightning_unitscale.cookbook.data.continuing_loader import loading
from lightning_unitscale.cookbook.data.examples import Batch, Examples, Image, Labelled, split_by
from lightning_unitscale.cookbook.figures import confusion_matrix
from lightning_unitscale.cookbook.pretrained import Pretrained
from lightning_unitscale.cookbook.tasks.task import Task
from lightning_unitscale.errors import InputError

Collate = Callable[[list[Any]], Batch]


def numbers_of(config: PreTrainedConfig) -> dict[str, int]:
    """Class -> its place in the head."""
    classes: Any = config.id2label
    return {label: number for number, label in classes.items()}


def check_classes(classes: Sequence[str], known: Mapping[str, int]) -> None:
    """
    Raises:
        InputError: the data has a class that the model does not know.
    """
    if unknown := [label for label in classes if label not in known]:
        raise InputError(
            f"the data has the class {unknown[0]!r}, but the model knows only {', '.join(map(repr, list(known)[:10]))}"
        )


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


class Classification(Task):
    """Batches: inputs of the model, and labels [batch]. The model's config says how many classes there are."""

    predicts_held_out = True

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

    @classmethod
    def classes(cls, examples: Sequence[Labelled | Image]) -> list[str]:
        """All that the examples have, in alphabetical order."""
        return sorted({example.label for example in examples})

    @classmethod
    def data_module(cls, examples: Sequence[Labelled | Image], found: Pretrained, cfg: DictConfig) -> Examples:
        """Batches of examples; those of one group stay on one side of the split.

        Raises:
            InputError: an example has a class that the model does not know.
        """
        known = numbers_of(found.model.config)
        check_classes(cls.classes(examples), known)
        parts = split_by(lambda example: example.group, examples, cfg.data.held_out, lambda example: example.label)
        return Examples(parts, cls.collate(known, found, cfg), **loading(cfg))

    @classmethod
    def collate(cls, numbers: dict[str, int], found: Pretrained, cfg: DictConfig) -> Collate:
        """What makes a batch of examples.

        Args:
            numbers: class -> its place in the head.
            found, cfg: as for `data_module`.
        """
        raise NotImplementedError

    def score(self, batch: Batch, output: Any) -> None:
        """Accuracy, that of the most frequent class, and the mean of the classes' F1."""
        self.metrics.update(output.logits, batch["labels"])

    def scores(self) -> dict[str, Tensor]:
        """Accuracy, that of the most frequent class, and the mean of the classes' F1."""
        values: dict[str, Tensor] = self.metrics.compute()
        return values

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The likeliest class of each example and how likely it is, beside its true class where that is known."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        probabilities = self.model(**inputs).logits.float().softmax(-1)  # [batch, classes]
        score, number = probabilities.max(-1)
        known = {"target": self._names(batch["labels"])} if "labels" in batch else {}
        return {"label": self._names(number), "score": score, **known}

    def show(self, batches: DataLoader[Any], folder: Path, settings: Mapping[str, Any]) -> list[str | Path]:
        """How often each class was taken for each, of all that is held out."""
        classes = self.model.config.num_labels
        counts = MulticlassConfusionMatrix(classes).to(self.device)
        for held_out in batches:
            batch = {name: tensor.to(self.device) for name, tensor in held_out.items()}
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            counts.update(self.model(**inputs).logits, batch["labels"])
        names = self._names(torch.arange(classes))
        return [confusion_matrix(counts.compute().cpu(), names, folder / "confusion.png")]

    def _names(self, numbers: Tensor) -> list[str]:
        return [self.model.config.id2label[number] for number in numbers.tolist()]
