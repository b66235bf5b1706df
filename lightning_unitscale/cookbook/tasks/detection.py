"""Finding objects in a picture: a class and a box for each.

A model answers with a fixed number of boxes, each with a class or none. Where in its answer an object belongs is known
(`center_net`), or found by the cheapest assignment of boxes to objects (DETR, arXiv 2005.12872); that loss is that of
transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unitscale.cookbook.data.continuing_loader import loading
from lightning_unitscale.cookbook.data.examples import IGNORED, Batch, Examples, split_by
from lightning_unitscale.cookbook.data.pictures import read_picture, resized
from lightning_unitscale.cookbook.data.scenes import Scene
from lightning_unitscale.cookbook.figures import picture_grid
from lightning_unitscale.cookbook.pretrained import Pretrained, image_size
from lightning_unitscale.cookbook.tasks import center_net  # noqa: F401  # tells transformers of the model
from lightning_unitscale.cookbook.tasks.average_precision import CocoAveragePrecision, coco_tools
from lightning_unitscale.cookbook.tasks.classification import check_classes, numbers_of
from lightning_unitscale.cookbook.tasks.task import Task

CERTAIN = 0.5  # what a box's score must be to count as found, in predictions and pictures


class SceneBatch:
    """pixel_values [batch, channels, height, width], classes and boxes [batch, most objects(, 4)], sizes [batch, 2].

    Boxes are centre x, centre y, width and height as shares of the picture. Where a picture has fewer objects than the
    one with most, classes are filled up with IGNORED. Sizes are the pictures' own heights and widths.

    Args:
        numbers: class -> number.
        channels: of the model.
        size: height and width to resize to, in pixels.
    """

    def __init__(self, numbers: Mapping[str, int], channels: int, size: tuple[int, int]) -> None:
        self.numbers, self.channels, self.size = numbers, channels, size

    def __call__(self, scenes: Sequence[Scene]) -> Batch:
        """One batch."""
        most = max(1, *(len(scene.labels) for scene in scenes))
        classes = torch.full((len(scenes), most), IGNORED)
        boxes = torch.zeros(len(scenes), most, 4)
        for row, scene in enumerate(scenes):
            height, width = scene.size
            left, top, wide, high = scene.boxes.unbind(-1)
            shares = torch.stack([left + wide / 2, top + high / 2, wide, high], -1) / torch.tensor([width, height] * 2)
            boxes[row, : len(shares)] = shares
            classes[row, : len(shares)] = torch.tensor([self.numbers[label] for label in scene.labels])
        pictures = [self._pixels(scene.picture) for scene in scenes]
        sizes = torch.tensor([scene.size for scene in scenes])
        return {"pixel_values": torch.stack(pictures), "classes": classes, "boxes": boxes, "sizes": sizes}

    def _pixels(self, picture: Tensor | Path) -> Tensor:
        pixels = picture if isinstance(picture, Tensor) else read_picture(picture, self.channels)
        return resized(pixels, self.channels, self.size)


class Detection(Task):
    """Batches: those of `SceneBatch`. The model's config says which classes there are."""

    heads = ("AutoModelForObjectDetection",)
    counted = "objects"
    predicts_held_out = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.precision = CocoAveragePrecision()

    @classmethod
    def check(cls, cfg: DictConfig) -> None:
        """The package for the score is there."""
        coco_tools()

    @classmethod
    def classes(cls, examples: Sequence[Scene]) -> list[str]:
        """All that the examples have, in alphabetical order."""
        return sorted({label for scene in examples for label in scene.labels})

    @classmethod
    def data_module(cls, examples: Sequence[Scene], found: Pretrained, cfg: DictConfig) -> Examples:
        """Batches of scenes; those of one group stay on one side of the split."""
        numbers = numbers_of(found.model.config)
        check_classes(cls.classes(examples), numbers)
        parts = split_by(lambda scene: scene.group, examples, cfg.data.held_out)
        collate = SceneBatch(numbers, found.model.config.num_channels, image_size(found.model))
        return Examples(parts, collate, **loading(cfg))

    def loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """The model's own, of classes, boxes and their overlap."""
        objects = [
            {"class_labels": classes[classes != IGNORED], "boxes": boxes[classes != IGNORED]}
            for classes, boxes in zip(batch["classes"], batch["boxes"], strict=True)
        ]
        output = self.model(pixel_values=batch["pixel_values"], labels=objects)
        return output.loss, output

    def count(self, batch: Batch) -> Tensor:
        """The true objects."""
        return (batch["classes"] != IGNORED).sum()

    def score(self, batch: Batch, output: Any) -> None:
        """Every box counts, in the order of its score."""
        for row, (scores, classes, boxes) in enumerate(zip(*self._found(output, batch), strict=True)):
            real = batch["classes"][row] != IGNORED
            wanted = in_pixels(batch["boxes"][row, real], batch["sizes"][row])
            self.precision.update(boxes, classes, scores, wanted, batch["classes"][row, real])

    def scores(self) -> dict[str, Tensor]:
        """COCO's mean average precision, and that at an IoU of 0.5."""
        values: dict[str, Tensor] = self.precision.compute()
        return values

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The objects that are certain, with their boxes (left, top, width, height) in pixels of the picture."""
        output = self.model(pixel_values=batch["pixel_values"])
        objects, targets = [], []
        for row, (scores, classes, boxes) in enumerate(zip(*self._found(output, batch), strict=True)):
            sure, real = scores > CERTAIN, batch["classes"][row] != IGNORED
            found = self._objects(classes[sure], boxes[sure])
            objects.append([{**one, "score": score} for one, score in zip(found, scores[sure].tolist(), strict=True)])
            true_boxes = in_pixels(batch["boxes"][row, real], batch["sizes"][row])
            targets.append(self._objects(batch["classes"][row, real], true_boxes))
        return {"objects": objects, "target": targets}

    def _found(self, output: Any, batch: Batch) -> tuple[Tensor, Tensor, list[Tensor]]:
        return found_objects(output, batch["sizes"], self.model.config.num_labels)

    def _objects(self, classes: Tensor, boxes: Tensor) -> list[dict[str, Any]]:
        names = self.model.config.id2label
        pairs = zip(classes.tolist(), boxes.tolist(), strict=True)
        return [{"label": names[number], "box": [round(value, 2) for value in box]} for number, box in pairs]

    def show(self, batches: DataLoader[Any], folder: Path, settings: Mapping[str, Any]) -> list[str | Path]:
        """Pictures with the boxes that were found, in red, on the true ones, in green."""
        batch = {name: tensor.to(self.device) for name, tensor in next(iter(batches)).items()}
        predicted = self.predict_step(batch, 0)
        height, width = batch["pixel_values"].shape[-2:]

        def draw(axes: Axes, number: int) -> None:
            high, wide = batch["sizes"][number].tolist()
            for objects, colour in ((predicted["target"][number], "lime"), (predicted["objects"][number], "red")):
                for one in objects:
                    left, top, box_wide, box_high = one["box"]
                    across, down = width / wide, height / high
                    corner = (left * across - 0.5, top * down - 0.5)
                    axes.add_patch(Rectangle(corner, box_wide * across, box_high * down, fill=False, edgecolor=colour))
                    if "score" in one:
                        axes.text(*corner, f"{one['label']} {one['score']:.2f}", color=colour, fontsize=7, va="bottom")

        return [picture_grid(batch["pixel_values"], folder / "objects.png", draw)]

    @staticmethod
    def example_inputs(model: Any, batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
        """Pixels [batch, channels, height, width]; some of these models count as decoders, but take no tokens."""
        shape = (batch, model.config.num_channels, *image_size(model))
        return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}


def found_objects(output: Any, sizes: Tensor, classes: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Of every query the best score and its class, both [batch, queries], and its box in pixels, [queries, 4] each.

    Args:
        output: logits [batch, queries, classes], each a probability of its own (RT-DETR), or classes + 1, whose last
            class is "nothing" (DETR); pred_boxes [batch, queries, 4].
        sizes: height and width of each picture.
        classes: how many there are.
    """
    logits = output.logits.float()
    likely = logits.sigmoid() if logits.shape[-1] == classes else logits.softmax(-1)[..., :-1]
    scores, best = likely.max(-1)
    boxes = [in_pixels(boxes, size) for boxes, size in zip(output.pred_boxes.float(), sizes, strict=True)]
    return scores, best, boxes


def in_pixels(boxes: Tensor, size: Tensor) -> Tensor:
    """Left, top, width, height in pixels, of centre, width and height as shares; both [objects, 4]."""
    centre, extent = boxes.split(2, -1)
    whole = size.flip(0)  # width, height
    return torch.cat([(centre - extent / 2) * whole, extent * whole], -1)
