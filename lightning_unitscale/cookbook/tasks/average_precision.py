"""Mean average precision, as COCO defines it, by COCO's own evaluation.

torchmetrics' own needs torchvision, whose wheels on PyPI load only beside torch for CUDA.
"""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_unitscale.errors import InputError


class CocoAveragePrecision(Metric):
    """The mean over IoU thresholds from 0.5 to 0.95 and over classes, and that at an IoU of 0.5 alone.

    Raises:
        InputError: `faster-coco-eval` is not installed.
    """

    found: list[Tensor]
    wanted: list[Tensor]
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        coco_tools()
        self.add_state("found", [], dist_reduce_fx="cat")
        self.add_state("wanted", [], dist_reduce_fx="cat")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, boxes: Tensor, classes: Tensor, scores: Tensor, true_boxes: Tensor, true_classes: Tensor) -> None:
        """One picture.

        Args:
            boxes: [objects, 4]: left, top, width and height in pixels.
            classes, scores: [objects].
            true_boxes: [true objects, 4].
            true_classes: [true objects].
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        ranks = torch.distributed.get_world_size() if distributed else 1
        number = self.images * ranks + (torch.distributed.get_rank() if distributed else 0) + 1
        self.found.append(_table(number, classes, scores, boxes))
        self.wanted.append(_table(number, true_classes, torch.ones_like(true_classes), true_boxes))
        self.images += 1

    def compute(self) -> dict[str, Tensor]:
        """`map` and `map_50`; 0 where there is no object at all."""
        tools = coco_tools()
        found, wanted = _rows(self.found), _rows(self.wanted)
        if not len(wanted) or not len(found):
            return {"map": torch.tensor(0.0), "map_50": torch.tensor(0.0)}
        ids = sorted({int(row[0]) for row in (*found, *wanted)})
        classes = sorted({int(row[1]) for row in (*found, *wanted)})
        with contextlib.redirect_stdout(io.StringIO()):  # its summary
            truth = tools.COCO(
                {
                    "images": [{"id": number} for number in ids],
                    "categories": [{"id": number, "name": str(number)} for number in classes],
                    "annotations": [
                        {**_annotation(row), "id": number, "area": row[5] * row[6], "iscrowd": 0}
                        for number, row in enumerate(wanted, start=1)
                    ],
                }
            )
            evaluation = tools.COCOeval_faster(truth, truth.loadRes([_annotation(row) for row in found]), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return {"map": torch.tensor(float(evaluation.stats[0])), "map_50": torch.tensor(float(evaluation.stats[1]))}


def _table(number: Tensor, classes: Tensor, scores: Tensor, boxes: Tensor) -> Tensor:
    """[objects, 7]: number of the picture, class, score, box."""
    columns = torch.stack([number.expand(len(classes)), classes, scores], 1)
    return torch.cat([columns.double(), boxes.double()], 1)


def _rows(state: list[Tensor] | Tensor) -> list[list[float]]:
    rows = torch.cat(state) if isinstance(state, list) and state else state
    return rows.tolist() if isinstance(rows, Tensor) else []


def _annotation(row: list[float]) -> dict[str, Any]:
    return {"image_id": int(row[0]), "category_id": int(row[1]), "score": row[2], "bbox": row[3:]}


def coco_tools() -> Any:
    """The package `faster_coco_eval`.

    Raises:
        InputError: it is not installed.
    """
    try:
        import faster_coco_eval
    except ImportError as error:
        raise InputError("detection needs faster-coco-eval: pip install 'lightning-unitscale[detection]'") from error
    logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)  # else a table of its own at every evaluation
    return faster_coco_eval
