"""Picture files as tensors."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from PIL import Image as Pillow
from PIL import UnidentifiedImageError
from torch import Tensor

from lightning_unitscale.errors import InputError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by channels


def check_picture(file: Path, where: str) -> tuple[int, int]:
    """Height and width of a picture, all of which can be read.

    Args:
        where: of the row that names it, for the message.

    Raises:
        InputError: there is no such file, or it is no whole picture.
    """
    try:
        with Pillow.open(file) as picture:
            picture.load()
            return picture.height, picture.width
    except FileNotFoundError as error:
        raise InputError(f"{where}: there is no file {file}") from error
    except (OSError, UnidentifiedImageError, Pillow.DecompressionBombError, SyntaxError, ValueError) as error:
        raise InputError(f"{where}: {file} is no picture that can be read ({error})") from error


def read_picture(file: Path, channels: int) -> Tensor:
    """Pixels [channels, height, width] with values in -1 … 1."""
    with Pillow.open(file) as picture:
        values = numpy.asarray(picture.convert(MODES[channels]), dtype=numpy.float32)
    return torch.from_numpy(values).reshape(*values.shape[:2], channels).permute(2, 0, 1) / 127.5 - 1


def resized(pixels: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """[channels, *size] of [some, height, width]; a grey picture is repeated for more channels."""
    if pixels.shape[-2:] != size:
        pixels = F.interpolate(pixels[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    return pixels.expand(channels, -1, -1)
