"""Pictures with several objects in them: digits pasted on canvases, and the user's own by COCO's JSON.

A canvas draws its digits from one of ten pools, and a split keeps pools whole: no handwritten digit is seen in training
and in the test. Equal digits are in the same pool.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_unitscale.cookbook.data.digits import digits
from lightning_unitscale.cookbook.data.pictures import check_picture
from lightning_unitscale.cookbook.data.sound_rows import sound_rows
from lightning_unitscale.errors import InputError
from lightning_unitscale.near_names import not_found

POOLS = 10
TRIES = 50  # to place a digit where it covers none


@dataclass(frozen=True)
class Scene:
    """A picture and the objects in it; scenes of one group stay on one side of a split.

    Attributes:
        picture: pixels [channels, height, width] with values in -1 … 1, or a file.
        size: its height and width.
        labels: the class of each object.
        boxes: [objects, 4]: left, top, width and height in pixels.
        mask: [height, width], 0 for the background, else the object's place among the labels, from 1; None where only
            boxes are known.
    """

    picture: Tensor | Path
    size: tuple[int, int]
    labels: tuple[str, ...]
    boxes: Tensor
    group: str
    mask: Tensor | None = None


def digit_scenes(count: int, size: int = 48, most: int = 5, seed: int = 1) -> list[Scene]:
    """Canvases with 1 to `most` handwritten digits of different sizes on a noisy ground.

    Args:
        count: number of canvases.
        size: height and width, in pixels.
        most: digits on one canvas.
        seed: chooses digits, sizes and places.
    """
    pools: list[list[tuple[Tensor, str]]] = [[] for _ in range(POOLS)]
    for image in digits():
        pool = int.from_bytes(hashlib.blake2b(image.group.encode(), digest_size=4).digest(), "little") % POOLS
        assert isinstance(image.pixels, Tensor)
        pools[pool].append((image.pixels[0] / 2 + 0.5, image.label))
    generator = torch.Generator().manual_seed(seed)
    return [_canvas(pools[number % POOLS], str(number % POOLS), size, most, generator) for number in range(count)]


def _canvas(pool: Sequence[tuple[Tensor, str]], group: str, size: int, most: int, generator: torch.Generator) -> Scene:
    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    canvas, mask = torch.zeros(size, size), torch.zeros(size, size, dtype=torch.long)
    labels: list[str] = []
    boxes: list[list[int]] = []
    for _ in range(between(1, most)):
        ink, label = pool[between(0, len(pool) - 1)]
        side = between(size // 5, size // 3)
        ink = F.interpolate(ink[None, None], (side, side), mode="bilinear", align_corners=False)[0, 0]
        for _ in range(TRIES):
            top, left = between(0, size - side), between(0, size - side)
            place = slice(top, top + side), slice(left, left + side)
            if not mask[place].any():
                break
        else:
            continue  # no room
        labels.append(label)
        canvas[place] = torch.maximum(canvas[place], ink)
        mask[place][ink > 0.25] = len(labels)
        rows, columns = (mask == len(labels)).nonzero().unbind(1)
        first, last = (int(columns.min()), int(rows.min())), (int(columns.max()), int(rows.max()))
        boxes.append([*first, last[0] - first[0] + 1, last[1] - first[1] + 1])
    noise = 0.1 * torch.randn(size, size, generator=generator)
    pixels = ((canvas + noise).clamp(0, 1) * 2 - 1)[None]
    return Scene(pixels, (size, size), tuple(labels), torch.tensor(boxes, dtype=torch.float32), group, mask)


def coco_file(path: str, folder: str | None = None, skip_broken: bool = False) -> list[Scene]:
    """The user's own pictures and boxes.

    Args:
        path: JSON as COCO has it: `images` (id, file_name), `annotations` (image_id, category_id, bbox), `categories`
            (id, name). Crowds (`iscrowd`) are left out.
        folder: where the pictures lie; default: beside the file.
        skip_broken: leave out pictures that can't be read or have wrong boxes, and boxes of no picture, and say how
            many they were.

    Raises:
        InputError: there is no such file, it is not of this kind, it has no box, or a picture or a box in it is wrong.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"data.path={path}: {not_found(file)}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        names = {category["id"]: str(category["name"]) for category in found["categories"]}
        rows = [(image["id"], str(image["file_name"])) for image in found["images"]]
        annotations = [
            (number, row["image_id"], row)
            for number, row in enumerate(found["annotations"], start=1)
            if not row.get("iscrowd")
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"data.path={path}: not COCO's JSON ({type(error).__name__}: {error})") from error
    root = Path(folder).expanduser() if folder else file.parent
    if not annotations:
        raise InputError(f"data.path={path}: it has no annotation of a box, so there is nothing to learn")
    if twice := [identity for identity, count in Counter(identity for identity, _ in rows).items() if count > 1]:
        raise InputError(f"data.path={path}: several images have the id {twice[0]}")
    of_image: dict[Any, list[Any]] = {identity: [] for identity, _ in rows}

    def placed(annotation: tuple[int, Any, Any]) -> None:
        number, identity, row = annotation
        if identity not in of_image:
            raise InputError(f"data.path={path}: annotation {number} is of image {identity}, which is not there")
        of_image[identity].append((number, row))

    sound_rows(annotations, placed, skip_broken)

    def read(row: tuple[Any, str]) -> Scene:
        identity, name = row
        height, width = check_picture(root / name, f"data.path={path}, image {identity}")
        labels, boxes = [], []
        for number, annotation in of_image[identity]:
            where = f"data.path={path}, annotation {number} of {name}"
            boxes.append(_box_in(annotation, (height, width), where))
            labels.append(_name_of(annotation, names, where))
        shape = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        return Scene(root / name, (height, width), tuple(labels), shape, name)

    return sound_rows(rows, read, skip_broken)


def _name_of(annotation: Mapping[str, Any], names: Mapping[Any, str], where: str) -> str:
    category = annotation.get("category_id")
    if category not in names:
        raise InputError(f"{where}: category {category} is not among the categories")
    return names[category]


def _box_in(annotation: Mapping[str, Any], size: tuple[int, int], where: str) -> list[float]:
    """Left, top, width, height; a box may reach one pixel beyond the picture, as rounding makes it."""
    (height, width), box = size, annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, (int, float)) for value in box):
        raise InputError(f"{where}: bbox must be [left, top, width, height], not {box}")
    left, top, wide, high = map(float, box)
    inside = left >= -1 and top >= -1 and left + wide <= width + 1 and top + high <= height + 1
    if not inside or wide <= 0 or high <= 0:
        raise InputError(f"{where}: the box {box} is not inside the picture of {width}×{height} pixels")
    return [left, top, wide, high]
