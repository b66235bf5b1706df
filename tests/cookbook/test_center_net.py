"""Objects as points: the loss of a picture worked out by hand, peaks alone, and pictures without an object."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_unitscale.cookbook.tasks.center_net import (
    NOTHING,
    SPREAD,
    CenterNet,
    CenterNetConfig,
    corners,
    heat_of,
    loss_of,
    placed,
)

TINY = CenterNetConfig(image_size=(16, 16), channels=(4, 4, 8), blocks=1, num_labels=2)
BOX = torch.tensor([0.25, 0.25, 0.25, 0.25])  # in the middle of the first of 2×2 cells
OBJECT = {"class_labels": torch.tensor([0]), "boxes": BOX[None]}
NONE = {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}


def test_a_cell_that_says_nothing_has_a_box_around_its_middle() -> None:
    boxes = placed(torch.zeros(1, 4, 2, 4))
    assert boxes.shape == (1, 4, 2, 4)
    torch.testing.assert_close(boxes[0, :, 1, 3], torch.tensor([3.5 / 4, 1.5 / 2, 0.25, 0.25]))
    torch.testing.assert_close(corners(BOX[None]), torch.tensor([[0.125, 0.125, 0.375, 0.375]]))


def test_the_loss_of_four_cells_is_that_of_the_formula() -> None:
    loss = loss_of(torch.zeros(1, 1, 2, 2), placed(torch.zeros(1, 4, 2, 2)), [OBJECT])
    sigma = 0.25 / SPREAD
    beside, across = math.exp(-((0.5 / sigma) ** 2) / 2), math.exp(-((0.5 / sigma) ** 2))
    hits = 0.25 * math.log(2)
    misses = sum((1 - heat) ** 4 * 0.25 * math.log(2) for heat in (beside, beside, across))
    assert float(loss) == pytest.approx(hits + misses, rel=1e-5)  # the box is right
    moved = placed(torch.zeros(1, 4, 2, 2))
    moved[:, 0] += 0.25  # by its own width: it touches the true one
    expected = hits + misses + 5 * 0.25 + 2 * (1 - 0)
    assert float(loss_of(torch.zeros(1, 1, 2, 2), moved, [OBJECT])) == pytest.approx(expected, rel=1e-5)


def test_heat_is_one_in_the_middle_and_falls_off_with_the_box() -> None:
    heat = heat_of(torch.tensor([0.5, 0.5, 0.6, 0.3]), 3, 3)
    assert float(heat[1, 1]) == 1
    wide, high = 0.6 / SPREAD, 0.3 / SPREAD
    assert float(heat[1, 0]) == pytest.approx(math.exp(-((1 / 3 / wide) ** 2) / 2), rel=1e-4)
    assert float(heat[0, 1]) == pytest.approx(math.exp(-((1 / 3 / high) ** 2) / 2), rel=1e-4)


def test_a_cell_beside_a_likelier_one_is_no_object() -> None:
    torch.manual_seed(0)
    model = CenterNet(TINY).eval()
    logits = model(torch.randn(1, 1, 16, 16)).logits.reshape(4, 4, 2)
    kept = logits != NOTHING
    assert kept.any()
    for row in range(3):
        for column in range(3):
            assert (kept[row : row + 2, column : column + 2].sum((0, 1)) <= 1).all()


def test_pictures_without_an_object_are_learned_from_too() -> None:
    torch.manual_seed(0)
    model = CenterNet(TINY)
    for labels in ([OBJECT, NONE], [NONE, NONE]):
        loss = model(torch.randn(2, 1, 16, 16), labels=labels).loss
        loss.backward()
        assert loss.isfinite()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
