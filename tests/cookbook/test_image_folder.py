"""Classification of the user's own images: a folder for each class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image as Pillow

from lightning_unitscale.cookbook.data.image_folder import image_folder
from lightning_unitscale.cookbook.figures import confusion_matrix
from lightning_unitscale.cookbook.tasks.image_classification import ImageBatch
from lightning_unitscale.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of two images, one of which stands there twice."""
    for name, colour in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
        (tmp_path / name / "more").mkdir(parents=True)
        Pillow.new("RGB", (6, 4), colour).save(tmp_path / name / "a.png")
        Pillow.new("RGB", (3, 3), colour).save(tmp_path / name / "more" / "b.png")
    Pillow.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / "cat" / "c.png")
    (tmp_path / "cat" / ".thumbnails").write_bytes(b"no image")
    return tmp_path


def test_folders_are_classes_and_equal_images_a_group(folder: Path) -> None:
    images = image_folder(str(folder))
    assert [(image.label, image.pixels.name) for image in images] == [
        ("cat", "a.png"),
        ("cat", "c.png"),
        ("cat", "b.png"),
        ("dog", "a.png"),
        ("dog", "b.png"),
    ]
    assert len({image.group for image in images}) == 4
    batch = ImageBatch({"cat": 0, "dog": 1}, 3, (8, 8))(images)
    assert batch["pixel_values"].shape == (5, 3, 8, 8)
    assert batch["labels"].tolist() == [0, 0, 0, 1, 1]
    torch.testing.assert_close(batch["pixel_values"][0, :, 0, 0], torch.tensor([1.0, -1, -1]))


def test_an_image_that_can_not_be_read_is_named_or_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "dog" / "z.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"class dog: .*z\.jpg is no picture that can be read"):
        image_folder(str(folder))
    assert len(image_folder(str(folder), skip_broken=True)) == 5
    assert "left out 1 of 6 rows" in capsys.readouterr().out


def test_a_folder_without_classes_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        image_folder(str(folder / "nowhere"))
    with pytest.raises(InputError, match="1 folders of classes, there is nothing to tell apart"):
        image_folder(str(folder / "dog"))
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="the folder of the class empty has no image"):
        image_folder(str(folder))


def test_a_confusion_matrix_is_drawn_for_classes_without_examples_too(tmp_path: Path) -> None:
    counts = torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    file = confusion_matrix(counts, ["a", "b", "never seen"], tmp_path / "confusion.png")
    with Pillow.open(file) as picture:
        assert min(picture.size) > 100
