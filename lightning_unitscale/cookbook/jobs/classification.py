"""Image classifiers on handwritten digits; scores are cross entropies in nats."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification

from lightning_unitscale.cookbook.jobs.job import Batch, Job
from lightning_unitscale.cookbook.jobs.pictures import digit_images

CLASSES = 10


class ImageClassifier(Job):
    """Digits and a head of transformers."""

    image_size: ClassVar[int] = 8

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.model: nn.Module

    def examples(self) -> tuple[Tensor, ...]:
        """Images and labels."""
        return digit_images(self.image_size)

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy."""
        images, labels = batch
        return F.cross_entropy(self.model(pixel_values=images).logits, labels)


class ViT(ImageClassifier):
    """A vision transformer on patches of 2×2."""

    branch_outputs = ("*.attention.output.dense", "*.layer.*.output.dense", "*.o_proj", "*.fc2")

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        config = AutoConfig.for_model(
            "vit",
            hidden_size=self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=self.width // 16,
            intermediate_size=4 * self.width,
            image_size=self.image_size,
            patch_size=2,
            num_channels=1,
            num_labels=CLASSES,
        )
        self.model = AutoModelForImageClassification.from_config(config)


class ResNet(ImageClassifier):
    """A convolutional net with BatchNorm."""

    image_size = 16

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        config = AutoConfig.for_model(
            "resnet",
            num_channels=1,
            embedding_size=self.width,
            hidden_sizes=[self.width, 2 * self.width],
            depths=[self.depth, self.depth],
            layer_type="basic",
            num_labels=CLASSES,
        )
        self.model = AutoModelForImageClassification.from_config(config)


class ConvNeXt(ImageClassifier):
    """Depthwise convolutions, LayerNorm and LayerScale."""

    branch_outputs = ("*.pwconv2",)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        config = AutoConfig.for_model(
            "convnext",
            num_channels=1,
            patch_size=2,
            image_size=self.image_size,
            num_stages=2,
            hidden_sizes=[self.width, 2 * self.width],
            depths=[self.depth, self.depth],
            num_labels=CLASSES,
        )
        self.model = AutoModelForImageClassification.from_config(config)
