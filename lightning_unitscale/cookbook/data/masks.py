"""Pictures with the class of every pixel: digits pasted on canvases, and the user's own folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image as Pillow
from torch import Tensor

from lightning_unitscale.cookbook.data.pictures import check_picture
from lightning_unitscale.cookbook.data.scenes import digit_scenes
from lightning_unitscale.cookbook.data.sound_rows import sound_rows
from lightning_unitscale.errors import InputError
from lightning_unitscale.near_names import not_found

UNKNOWN = 255  # a pixel that counts neither in the loss nor in a score


@dataclass(frozen=True)
class Masked:
    """A picture and its mask; those of one group stay on one side of a split.

    Attributes:
        picture: pixels [channels, height, width] with values in -1 … 1, or a file.
        mask: [height, width], the number of each pixel's class, or UNKNOWN; or a file that holds it.
        names: of the classes, in the order of their numbers.
    """

    picture: Tensor | Path
    mask: Tensor | Path
    names: tuple[str, ...]
    group: str


def digit_masks(count: int, size: int = 48, most: int = 5, seed: int = 1) -> list[Masked]:
    """The canvases of `digit_scenes`; the class of a pixel is its digit, or background."""
    names = ("background", *map(str, range(10)))
    examples = []
    for scene in digit_scenes(count, size, most, seed):
        assert scene.mask is not None
        classes = torch.tensor([0, *(names.index(label) for label in scene.labels)])
        examples.append(Masked(scene.picture, classes[scene.mask], names, scene.group))
    return examples


def mask_folder(
    path: str,
    pictures: str = "images",
    masks: str = "masks",
    names: Sequence[str] | None = None,
    skip_broken: bool = False,
) -> list[Masked]:
    """The user's own pictures and masks.

    Args:
        path: a folder.
        pictures: its folder of pictures.
        masks: its folder of PNG files of the same names without ending, whose pixels (grey values or places in a
            palette) are numbers of classes, or 255 for those that count nowhere.
        names: of the classes, in the order of their numbers; default: the numbers themselves.
        skip_broken: leave out pictures that can't be read or whose masks are wrong, and say how many they were.

    Raises:
        InputError: there is no such folder, or a picture or mask is missing, can't be read, or is wrong.
    """
    root = Path(path).expanduser()
    for folder in (root / pictures, root / masks):
        if not folder.is_dir():
            raise InputError(f"data.path={path}: {not_found(folder)}")

    def read(picture: Path) -> tuple[Path, Path, int]:
        size = check_picture(picture, f"data.path={path}")
        mask = root / masks / f"{picture.stem}.png"
        if check_picture(mask, f"data.path={path}, {picture.name}") != size:
            raise InputError(f"{mask}: another size than {picture}")
        values = read_mask(mask)
        largest = int(values[values != UNKNOWN].max()) if (values != UNKNOWN).any() else 0
        if names is not None and largest >= len(names):
            raise InputError(f"{mask}: class {largest} is out of range, there are {len(names)} names")
        return picture, mask, largest

    files = sorted(file for file in (root / pictures).iterdir() if file.is_file())
    if not files:
        raise InputError(f"data.path={path}: no file in {root / pictures}")
    rows = sound_rows(files, read, skip_broken)
    known = tuple(names or map(str, range(max(largest for *_, largest in rows) + 1)))
    return [Masked(picture, mask, known, picture.name) for picture, mask, _ in rows]


def read_mask(file: Path) -> Tensor:
    """[height, width], as stored: places in a palette are not turned into colours.

    Raises:
        InputError: it has several channels.
    """
    with Pillow.open(file) as mask:
        values = numpy.asarray(mask)
    if values.ndim != 2:
        raise InputError(f"{file}: a mask has one channel, whose values are numbers of classes; this is {mask.mode}")
    return torch.from_numpy(values.astype(numpy.int64))
