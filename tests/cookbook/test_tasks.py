"""Every task of the table in recipes/README.md: a few steps, a resume, predictions, an export; its score by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image as Pillow
from support.recipe_runs import run_recipe

from lightning_unitscale.cookbook.data.digits import digits
from lightning_unitscale.cookbook.data.examples import split_by
from lightning_unitscale.cookbook.data.masks import mask_folder
from lightning_unitscale.cookbook.data.scenes import coco_file, digit_scenes
from lightning_unitscale.cookbook.tasks.average_precision import CocoAveragePrecision
from lightning_unitscale.cookbook.tasks.detection import Detection, SceneBatch, in_pixels
from lightning_unitscale.cookbook.tasks.segmentation import Segmentation
from lightning_unitscale.errors import InputError


@dataclass(frozen=True)
class Case:
    """A task made small: what is set, which scores are logged, columns of its predictions, and files to look at."""

    settings: tuple[str, ...]
    scores: tuple[str, ...]
    columns: tuple[str, ...]
    files: tuple[str, ...]


TASKS = {
    "detection": Case(
        ("data.scenes.count=60", "data.batch_size=4", "model.config.num_hidden_layers=2"),
        ("map", "map_50"),
        ("objects", "target"),
        ("objects.png",),
    ),
    "segmentation": Case(
        ("data.masks.count=60", "data.batch_size=4"),
        ("mean_iou", "pixel_accuracy"),
        ("pixels", "target"),
        ("masks.png",),
    ),
}
QUICK = [
    "trainer.val_check_interval=2",
    "trainer.limit_val_batches=2",
    "trainer.enable_progress_bar=false",
    "schedule.warmup_steps=1",
    "schedule.decay_steps=4",
    "logger=csv",
    "checkpoint_every=2",
    "+callbacks.checkpoints.save_top_k=-1",
    "monitor=none",
]


@pytest.fixture(scope="module", params=TASKS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a task, and the folder in which four steps of its pre-training lie under `run`."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    run_recipe("pretrain", folder, f"experiment={name}", "trainer.max_steps=4", *QUICK, *TASKS[name].settings)
    return name, folder


def test_a_task_is_trained_and_shown(run: tuple[str, Path]) -> None:
    name, folder = run
    metrics = json.loads((folder / "run" / "report" / "metrics.json").read_text())
    assert {f"val/{score}" for score in ("loss", *TASKS[name].scores)} <= metrics.keys()
    page = (folder / "run" / "report" / "index.html").read_text()
    for file in TASKS[name].files:
        assert (folder / "run" / "report" / "shown" / file).stat().st_size > 0
        assert f"shown/{file}" in page


def test_a_task_resumes_exactly(run: tuple[str, Path]) -> None:
    name, folder = run
    halfway = folder / "run" / "checkpoints" / "step-2.ckpt"
    settings = [f"experiment={name}", "trainer.max_steps=4", *QUICK, *TASKS[name].settings, "hydra.run.dir=resumed"]
    run_recipe("pretrain", folder, *settings, f"ckpt_path={halfway}")
    whole, resumed = (
        torch.load(folder / made / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for made in ("run", "resumed")
    )
    for parameter, value in whole.items():
        assert torch.equal(value, resumed[parameter]), parameter


def test_a_task_predicts_what_was_held_out(run: tuple[str, Path]) -> None:
    name, folder = run
    settings = [f"model.path={folder}/run/checkpoints/last.ckpt", "hydra.run.dir=predicted", "progress_bar=false"]
    run_recipe("inference", folder, "mode=predict", "output=answers.jsonl", *settings)
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert rows
    assert set(TASKS[name].columns) <= rows[0].keys()
    for file in TASKS[name].files:
        assert (folder / "answers" / "shown" / file).is_file()


def test_a_task_is_exported(run: tuple[str, Path]) -> None:
    _, folder = run
    settings = [f"model.path={folder}/run/checkpoints/last.ckpt", "output=model.safetensors", "format=safetensors"]
    _, printed = run_recipe("export", folder, *settings, "hydra.run.dir=exported")
    assert "read back" in printed


# --- detection and segmentation ---------------------------------------------------------------------------------------


def test_average_precision_of_one_right_and_one_wrong_box() -> None:
    metric = CocoAveragePrecision()
    true = torch.tensor([[0.0, 0, 10, 10], [30, 30, 10, 10]])
    found = torch.tensor([[0.0, 0, 10, 10], [15, 15, 10, 10]])
    metric.update(found, torch.tensor([1, 1]), torch.tensor([0.9, 0.8]), true, torch.tensor([1, 1]))
    scores = metric.compute()  # precision is 1 up to a recall of ½: at 51 of COCO's 101 points
    assert float(scores["map"]) == pytest.approx(51 / 101)
    assert float(scores["map_50"]) == pytest.approx(51 / 101)
    metric.update(true, torch.tensor([1, 1]), torch.tensor([0.95, 0.85]), true, torch.tensor([1, 1]))
    assert 51 / 101 < float(metric.compute()["map"]) < 1
    metric.reset()
    metric.update(found[:0], torch.tensor([]), torch.tensor([]), true, torch.tensor([1, 1]))
    assert float(metric.compute()["map"]) == 0


def test_mean_iou_of_four_pixels() -> None:
    model = {"model_type": "segformer", "num_labels": 2, "image_size": 32}
    module = Segmentation(model)
    logits = torch.tensor([[[[1.0, 1], [0, 0]], [[0, 0], [1, 1]]]])  # classes 0 0 / 1 1
    labels = torch.tensor([[[0, 1], [1, 255]]])
    module.score({"labels": labels}, type("Output", (), {"logits": logits}))
    assert float(module.scores()["mean_iou"]) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert float(module.scores()["pixel_accuracy"]) == pytest.approx(2 / 3)
    assert int(module.count({"labels": labels})) == 3


def test_no_digit_is_in_training_and_test_and_boxes_are_tight() -> None:
    scenes = digit_scenes(40)
    parts = split_by(lambda scene: scene.group, scenes, 0.1)
    groups = [{scene.group for scene in part} for part in parts]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    for scene in scenes:
        assert scene.mask is not None
        for number, (left, top, width, height) in enumerate(scene.boxes.int().tolist(), start=1):
            inside = scene.mask[top : top + height, left : left + width] == number
            assert int(inside.sum()) == int((scene.mask == number).sum())
            assert all(bool(edge.any()) for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
    assert torch.equal(digit_scenes(40)[7].boxes, scenes[7].boxes)


def test_boxes_of_a_batch_lead_back_to_pixels() -> None:
    scene = digit_scenes(1)[0]
    batch = SceneBatch({str(digit): digit for digit in range(10)}, 3, (32, 32))([scene])
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    torch.testing.assert_close(in_pixels(batch["boxes"][0], batch["sizes"][0]), scene.boxes)


def test_the_users_own_boxes_are_read_and_wrong_ones_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        Pillow.new("RGB", (20, 10)).save(tmp_path / f"{number}.jpg")
    (tmp_path / "2.jpg").write_bytes((tmp_path / "2.jpg").read_bytes()[:100])  # cut short
    annotations = [{"image_id": number, "category_id": 7, "bbox": [1, 2, 3, 4]} for number in range(3)]
    coco = {
        "images": [{"id": number, "file_name": f"{number}.jpg"} for number in range(3)],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "cat"}],
    }
    file = tmp_path / "coco.json"
    file.write_text(json.dumps(coco))
    with pytest.raises(InputError, match=r"image 2: .*2\.jpg is no picture"):
        coco_file(str(file))
    scenes = coco_file(str(file), skip_broken=True)
    assert "left out 1 of 3 rows" in capsys.readouterr().out
    assert [(scene.labels, scene.size, scene.boxes.tolist()) for scene in scenes] == [
        (("cat",), (10, 20), [[1, 2, 3, 4]])
    ] * 2
    for wrong, message in (
        ({"bbox": [15, 2, 10, 4]}, r"annotation 2 of 1\.jpg: the box .* is not inside the picture of 20×10"),
        ({"category_id": 8}, "category 8 is not among"),
        ({"image_id": 9}, "annotation 2 is of image 9"),
    ):
        file.write_text(json.dumps({**coco, "annotations": [annotations[0], {**annotations[1], **wrong}]}))
        with pytest.raises(InputError, match=message):
            coco_file(str(file))


def test_the_users_own_masks_are_read_and_wrong_ones_named(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    Pillow.new("L", (6, 4)).save(tmp_path / "images" / "a.png")
    mask = Pillow.new("P", (6, 4))
    mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    mask.putpixel((5, 3), 2)
    mask.save(tmp_path / "masks" / "a.png")
    (example,) = mask_folder(str(tmp_path))
    assert example.names == ("0", "1", "2")
    with pytest.raises(InputError, match=r"a\.png: class 2 is out of range, there are 2 names"):
        mask_folder(str(tmp_path), names=["ground", "tree"])
    Pillow.new("L", (5, 4)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(InputError, match="another size than"):
        mask_folder(str(tmp_path))


def test_classes_are_those_of_the_data() -> None:
    assert Detection.classes(digit_scenes(30)) == sorted({image.label for image in digits()})
