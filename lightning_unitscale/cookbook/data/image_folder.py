"""The user's own images, sorted into folders that are their classes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lightning_unitscale.cookbook.data.examples import Image
from lightning_unitscale.cookbook.data.pictures import check_picture
from lightning_unitscale.cookbook.data.sound_rows import sound_rows
from lightning_unitscale.errors import InputError
from lightning_unitscale.near_names import not_found


def image_folder(path: str, skip_broken: bool = False) -> list[Image]:
    """Images in the layout of torchvision's ImageFolder: path/class/image, at any depth below the class.

    Equal files stay on one side of a split; files whose names begin with a dot are passed over.

    Args:
        path: a folder.
        skip_broken: leave out images that can't be read, and say how many they were.

    Raises:
        InputError: there is no such folder, it has fewer than two folders of classes, one of them is empty, or an image
            can't be read.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise InputError(f"data.path={path}: {not_found(root)}")
    classes = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if len(classes) < 2:
        raise InputError(
            f"data.path={path}: {len(classes)} folders of classes, there is nothing to tell apart; the images of each "
            "class belong into a folder of its name: path/cat/1.png, path/dog/2.png"
        )
    rows = [(folder.name, file) for folder in classes for file in _files(folder, path)]

    def read(row: tuple[str, Path]) -> Image:
        label, file = row
        check_picture(file, f"data.path={path}, class {label}")
        return Image(file, label, hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest())

    return sound_rows(rows, read, skip_broken)


def _files(folder: Path, path: str) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    if not files:
        raise InputError(f"data.path={path}: the folder of the class {folder.name} has no image")
    return files
