"""Choosing one of several classes for an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from omegaconf import DictConfig

from lightning_unitscale.cookbook.data.examples import Batch, Image
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
        pixels = torch.stack([image.pixels for image in images])
        if pixels.shape[-2:] != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bilinear", align_corners=False)
        labels = torch.tensor([self.labels[image.label] for image in images])
        return {"pixel_values": pixels.expand(-1, self.channels, -1, -1), "labels": labels}


class ImageClassification(Classification):
    """Batches: pixel_values [batch, channels, height, width], labels [batch]."""

    heads = ("AutoModelForImageClassification",)

    @classmethod
    def collate(cls, numbers: dict[str, int], found: Pretrained, cfg: DictConfig) -> Collate:
        """Images of the size and channels that the model takes."""
        return ImageBatch(numbers, found.model.config.num_channels, image_size(found.model))
