"""Handwritten digits that come with scikit-learn: 1797 images of 8×8, no download."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_unitscale.cookbook.data.examples import Image
from lightning_unitscale.errors import InputError


def digits() -> list[Image]:
    """Images [1, 8, 8].

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("data=digits needs scikit-learn: pip install 'lightning-unitscale[recipes]'") from error
    found = load_digits()
    pixels: Tensor = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    return [
        Image(image, label=str(label), group=image.numpy().tobytes().hex())
        for image, label in zip(pixels, found.target, strict=True)
    ]
