"""Saying for every pixel of a picture what it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from lightning_unitscale.cookbook.data.continuing_loader import loading
from lightning_unitscale.cookbook.data.examples import Batch, Examples, split_by
from lightning_unitscale.cookbook.data.masks import UNKNOWN, Masked, read_mask
from lightning_unitscale.cookbook.data.pictures import read_picture, resized
from lightning_unitscale.cookbook.figures import picture_grid
from lightning_unitscale.cookbook.pretrained import Pretrained, image_size
from lightning_unitscale.cookbook.tasks.task import Task


class MaskBatch:
    """pixel_values [batch, channels, height, width], labels [batch, height, width]: classes, or UNKNOWN.

    Args:
        channels: of the model.
        size: height and width to resize to, in pixels; masks take the nearest pixel's class.
    """

    def __init__(self, channels: int, size: tuple[int, int]) -> None:
        self.channels, self.size = channels, size

    def __call__(self, examples: Sequence[Masked]) -> Batch:
        """One batch."""
        pictures = [self._pixels(example.picture) for example in examples]
        masks = [example.mask if isinstance(example.mask, Tensor) else read_mask(example.mask) for example in examples]
        nearest = [F.interpolate(mask[None, None].float(), self.size, mode="nearest")[0, 0].long() for mask in masks]
        return {"pixel_values": torch.stack(pictures), "labels": torch.stack(nearest)}

    def _pixels(self, picture: Tensor | Path) -> Tensor:
        pixels = picture if isinstance(picture, Tensor) else read_picture(picture, self.channels)
        return resized(pixels, self.channels, self.size)


class Segmentation(Task):
    """Batches: those of `MaskBatch`. The model's config says which classes there are."""

    heads = ("AutoModelForSemanticSegmentation",)
    counted = "pixels"
    predicts_held_out = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        classes = self.model.config.num_labels
        self.metrics = MetricCollection(
            {
                "mean_iou": MulticlassJaccardIndex(classes, ignore_index=UNKNOWN),
                "pixel_accuracy": MulticlassAccuracy(classes, average="micro", ignore_index=UNKNOWN),
            },
            compute_groups=False,
        )

    @classmethod
    def classes(cls, examples: Sequence[Masked]) -> list[str]:
        """In the order of their numbers."""
        return list(examples[0].names)

    @classmethod
    def data_module(cls, examples: Sequence[Masked], found: Pretrained, cfg: DictConfig) -> Examples:
        """Batches of pictures; those of one group stay on one side of the split."""
        parts = split_by(lambda example: example.group, examples, cfg.data.held_out)
        return Examples(parts, MaskBatch(found.model.config.num_channels, image_size(found.model)), **loading(cfg))

    def loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """The mean over the pixels that count; logits are enlarged to the picture's size."""
        output = self.model(pixel_values=batch["pixel_values"])
        logits = enlarged(output.logits, batch["labels"].shape[-2:])
        return F.cross_entropy(logits, batch["labels"], ignore_index=UNKNOWN), output

    def count(self, batch: Batch) -> Tensor:
        """Pixels whose class is known."""
        return (batch["labels"] != UNKNOWN).sum()

    def score(self, batch: Batch, output: Any) -> None:
        """The mean over classes of intersection over union of all pixels, and the share of pixels that are right."""
        self.metrics.update(enlarged(output.logits, batch["labels"].shape[-2:]).argmax(1), batch["labels"])

    def scores(self) -> dict[str, Tensor]:
        """The mean over classes of intersection over union of all pixels, and the share of pixels that are right."""
        values: dict[str, Tensor] = self.metrics.compute()
        return values

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """How many pixels of the resized picture belong to each class, beside the true numbers."""
        return {"pixels": self._areas(self.masks(batch)), "target": self._areas(batch["labels"])}

    def masks(self, batch: Batch) -> Tensor:
        """The likeliest class of every pixel, [batch, height, width]."""
        pixels = batch["pixel_values"]
        return enlarged(self.model(pixel_values=pixels).logits, pixels.shape[-2:]).argmax(1)

    def _areas(self, masks: Tensor) -> list[dict[str, int]]:
        names = self.model.config.id2label
        counts = [torch.bincount(mask.flatten(), minlength=len(names)).tolist() for mask in masks]
        return [{names[number]: row[number] for number in range(len(names)) if row[number]} for row in counts]

    def show(self, batches: DataLoader[Any], folder: Path, settings: Mapping[str, Any]) -> list[str | Path]:
        """Pictures under the classes that were found, with the edges of the true ones in white."""
        batch = {name: tensor.to(self.device) for name, tensor in next(iter(batches)).items()}
        masks, names = self.masks(batch).cpu().numpy(), self.model.config.id2label
        colours = matplotlib.colormaps["tab20"].resampled(len(names))

        def draw(axes: Axes, number: int) -> None:
            found, true = masks[number], batch["labels"][number].cpu().numpy()
            shown = numpy.ma.masked_equal(found, 0)  # the first class is most often the background
            axes.imshow(shown, cmap=colours, vmin=0, vmax=len(names) - 1, alpha=0.6, interpolation="nearest")
            axes.contour(true > 0, levels=[0.5], colors="white", linewidths=0.5)
            axes.set_title(" ".join(names[one] for one in numpy.unique(shown.compressed())), fontsize=7)

        return [picture_grid(batch["pixel_values"], folder / "masks.png", draw)]


def enlarged(logits: Tensor, size: Sequence[int]) -> Tensor:
    """[batch, classes, *size] of logits for fewer pixels."""
    return F.interpolate(logits.float(), list(size), mode="bilinear", align_corners=False)
