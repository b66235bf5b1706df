"""Objects as points (Zhou et al., 2019, arXiv 1904.07850): every cell of a grid says whether a centre lies in it.

    class loss    −(1 − p)² ln p                 at the cell with an object's centre
                  −(1 − heat)⁴ p² ln(1 − p)      elsewhere; heat falls off around each centre as a Gaussian
    box loss      5 · L1 + 2 · (1 − generalised IoU), at these cells alone

Everything is a mean over objects. No matching: an object's cell is known from the first step on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_for_object_detection import generalized_box_iou
from transformers.utils.generic import ModelOutput

RARE = 0.01  # the share of cells that are taken for a centre at first
NOTHING = -20.0  # the logit of a cell beside a likelier one
SPREAD = 6.0  # of a box's side in standard deviations of its heat


class CenterNetConfig(PreTrainedConfig):
    """Sizes: channels at full resolution, at half, and at a quarter, where the grid is."""

    model_type = "center_net"

    def __init__(
        self,
        image_size: tuple[int, int] = (48, 48),
        num_channels: int = 1,
        channels: tuple[int, int, int] = (16, 32, 64),
        blocks: int = 2,
        **others: Any,
    ) -> None:
        self.image_size, self.num_channels = list(image_size), num_channels
        self.channels, self.blocks = list(channels), blocks
        super().__init__(**others)


def convolution(before: int, after: int, stride: int = 1) -> nn.Sequential:
    """3×3, normalised over the batch."""
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


class ResidualConvolutions(nn.Module):
    """Two convolutions, added to what they read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = convolution(width, width)
        self.outer = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, states: Tensor) -> Tensor:
        """[batch, width, height, width of the grid] of the same."""
        return (states + self.outer(self.inner(states))).relu()  # type: ignore[no-any-return]  # modules are called untyped


class CenterNet(PreTrainedModel):
    """See above."""

    config_class = CenterNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CenterNetConfig) -> None:
        super().__init__(config)
        full, half, quarter = config.channels
        self.stem = nn.Sequential(
            convolution(config.num_channels, full), convolution(full, half, 2), convolution(half, quarter, 2)
        )
        self.blocks = nn.Sequential(*(ResidualConvolutions(quarter) for _ in range(config.blocks)))
        self.class_inner, self.box_inner = convolution(quarter, quarter), convolution(quarter, quarter)
        self.classes = nn.Conv2d(quarter, config.num_labels or 1, 1)
        self.boxes = nn.Conv2d(quarter, 4, 1)
        nn.init.constant_(self.classes.bias, math.log(RARE / (1 - RARE)))  # type: ignore[arg-type]  # the bias is there
        self.post_init()  # type: ignore[no-untyped-call]  # transformers has no types here

    def _init_weights(self, module: nn.Module) -> None:
        """Torch's own initial values."""

    def forward(
        self, pixel_values: Tensor, labels: Sequence[Mapping[str, Tensor]] | None = None, **others: Any
    ) -> ModelOutput:
        """Every cell's classes and box, and the loss where the true objects are given.

        Args:
            pixel_values: [batch, channels, height, width].
            labels: for each picture class_labels [objects] and boxes [objects, 4], centre x, centre y, width and height
                as shares of the picture.

        Returns:
            logits [batch, cells, classes] of independent probabilities, NOTHING beside a cell where the class is
            likelier; pred_boxes [batch, cells, 4] as in the labels.
        """
        states = self.blocks(self.stem(pixel_values))
        heat = self.classes(self.class_inner(states)).float()  # [batch, classes, rows, columns]
        boxes = placed(self.boxes(self.box_inner(states)).float())
        peaks = heat.where(heat == F.max_pool2d(heat, 3, 1, 1), NOTHING)
        output = {"logits": peaks.flatten(2).transpose(1, 2), "pred_boxes": boxes.flatten(2).transpose(1, 2)}
        if labels is None:
            return ModelOutput(**output)
        return ModelOutput(loss=loss_of(heat, boxes, labels), **output)


AutoConfig.register(CenterNetConfig.model_type, CenterNetConfig)
AutoModelForObjectDetection.register(CenterNetConfig, CenterNet)


def placed(raw: Tensor) -> Tensor:
    """Boxes [batch, 4, rows, columns] as shares of the picture; 0 is a box around the cell's middle, a quarter wide."""
    rows, columns = raw.shape[-2:]
    across = (torch.arange(columns, device=raw.device) + 0.5 + raw[:, 0]) / columns
    down = (torch.arange(rows, device=raw.device)[:, None] + 0.5 + raw[:, 1]) / rows
    return torch.stack([across, down, *(raw[:, 2:].clamp(-4, 4).exp() / 4).unbind(1)], 1)


def loss_of(heat: Tensor, boxes: Tensor, labels: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The mean over all true objects.

    Args:
        heat: logits [batch, classes, rows, columns].
        boxes: [batch, 4, rows, columns].
        labels: as for `CenterNet`.
    """
    rows, columns = heat.shape[-2:]
    target, centres = torch.zeros_like(heat), torch.zeros_like(heat, dtype=torch.bool)
    pictures = torch.cat([torch.full_like(one["class_labels"], place) for place, one in enumerate(labels)])
    kinds, true = torch.cat([one["class_labels"] for one in labels]), torch.cat([one["boxes"] for one in labels])
    column = (true[:, 0] * columns).long().clamp(0, columns - 1)
    row = (true[:, 1] * rows).long().clamp(0, rows - 1)
    for picture, kind, box in zip(pictures.tolist(), kinds.tolist(), true, strict=True):
        target[picture, kind] = torch.maximum(target[picture, kind], heat_of(box, rows, columns))
    centres[pictures, kinds, row, column] = True
    likely = heat.sigmoid()
    hits = ((1 - likely).square() * F.logsigmoid(heat))[centres].sum()
    misses = ((1 - target) ** 4 * likely.square() * F.logsigmoid(-heat))[~centres].sum()
    found = boxes[pictures, :, row, column]  # [objects, 4]
    overlap = generalized_box_iou(corners(found), corners(true)).diagonal()
    box_loss = 5 * (found - true).abs().sum() + 2 * (1 - overlap).sum()
    total: Tensor = box_loss - hits - misses
    return total / max(1, len(true))


def heat_of(box: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns]: 1 in the middle of a box, a Gaussian as wide as the box over SPREAD."""
    across = (torch.arange(columns, device=box.device) + 0.5) / columns - box[0]
    down = (torch.arange(rows, device=box.device) + 0.5) / rows - box[1]
    wide, high = (box[2:] / SPREAD).clamp(min=1e-4)
    return torch.exp(-(across / wide).square() / 2 - (down / high).square()[:, None] / 2)


def corners(boxes: Tensor) -> Tensor:
    """Left, top, right, bottom of centre, width and height; both [objects, 4]."""
    centre, extent = boxes.split(2, -1)
    return torch.cat([centre - extent / 2, centre + extent / 2], -1)
