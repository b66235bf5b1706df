"""Choosing one of several classes for an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unitscale.cookbook.data.examples import Batch, Image
from lightning_unitscale.cookbook.data.pictures import read_picture, resized
from lightning_unitscale.cookbook.figures import picture_grid
from lightning_unitscale.cookbook.pretrained import Pretrained, image_size
from lightning_unitscale.cookbook.tasks.classification import Classification, Collate


class ImageBatch:
    """pixel_values [batch, channels, height, width], labels [batch].

    Args:
        labels: class -> number.
        channels: grey images are repeated for more than one.
        size: height and width to resize to, in pixels.
    """

    def __init__(self, labels: Mapping[str, int], channels: int, size: tuple[int, int]) -> None:
        self.labels, self.channels, self.size = labels, channels, size

    def __call__(self, images: Sequence[Image]) -> Batch:
        """One batch."""
        pixels = torch.stack([self._pixels(image.pixels) for image in images])
        return {"pixel_values": pixels, "labels": torch.tensor([self.labels[image.label] for image in images])}

    def _pixels(self, picture: Tensor | Path) -> Tensor:
        pixels = picture if isinstance(picture, Tensor) else read_picture(picture, self.channels)
        return resized(pixels, self.channels, self.size)


class ImageClassification(Classification):
    """Batches: pixel_values [batch, channels, height, width], labels [batch]."""

    heads = ("AutoModelForImageClassification",)

    @classmethod
    def collate(cls, numbers: dict[str, int], found: Pretrained, cfg: DictConfig) -> Collate:
        """Images of the size and channels that the model takes."""
        return ImageBatch(numbers, found.model.config.num_channels, image_size(found.model))

    def show(self, batches: DataLoader[Any], folder: Path, settings: Mapping[str, Any]) -> list[str | Path]:
        """How often each class was taken for each, and some images under their answers, wrong ones in red."""
        batch = {name: tensor.to(self.device) for name, tensor in next(iter(batches)).items()}
        answers = self.predict_step(batch, 0)

        def draw(axes: Axes, number: int) -> None:
            found, true = answers["label"][number], answers["target"][number]
            title = found if found == true else f"{found}, not {true}"
            axes.set_title(title, fontsize=8, color="black" if found == true else "red")

        grid = picture_grid(batch["pixel_values"], folder / "answers.png", draw)
        return [*super().show(batches, folder, settings), grid]
