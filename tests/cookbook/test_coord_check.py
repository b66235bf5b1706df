"""unitscale coord_check: slopes of hand-made and of known models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.recipe_runs import run_recipe
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_unitscale.cookbook.coordinates.measure import Coordinate, CoordinateRun
from lightning_unitscale.cookbook.coordinates.slopes import CoordinateSlopes, by_module, exponent, failing, slopes


class Wide(pl.LightningModule):
    """A user's module: a linear layer with weights of std 1, whose output grows as √width."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(units, 8, bias=False), nn.Linear(8, 1)
        nn.init.normal_(self.layer.weight)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.head(self.layer(batch)).square().mean()

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(torch.randn(64, self.layer.in_features, generator=generator), batch_size=64)


class Manual(Wide):
    def __init__(self, units: int) -> None:
        super().__init__(units)
        self.automatic_optimization = False


def test_the_exponent_of_a_power_is_found() -> None:
    sizes = [16, 32, 64, 128]
    assert exponent(sizes, [3 * size**-0.5 for size in sizes]) == pytest.approx(-0.5)
    assert exponent(sizes, [1.0, 1.0, math.inf, 1.0]) == math.inf
    assert math.isnan(exponent(sizes, [0.0] * 4))


def test_what_passes() -> None:
    assert CoordinateSlopes(-0.5, 0.0).passes(0.3)
    assert not CoordinateSlopes(0.5, 0.0).passes(0.3)
    assert not CoordinateSlopes(0.0, -0.5).passes(0.3)
    assert CoordinateSlopes(0.0, -0.5).passes(0.3, may_fall=True)
    assert not CoordinateSlopes(0.0, math.inf).passes(0.3, may_fall=True)
    assert CoordinateSlopes(0.0, math.nan).passes(0.3)


def test_layers_of_one_kind_and_seeds_are_averaged() -> None:
    made = [
        Coordinate(CoordinateRun("standard", "depth", depth, "normal", seed), name, depth * (1 + seed), 1.0)
        for depth in (2, 4)
        for seed in (0, 1)
        for name in ("layers.0.mlp", "layers.1.mlp", "head")
    ]
    found = by_module(made)
    assert set(found) == {("standard", "depth", "normal", name) for name in ("layers.*.mlp", "head")}
    sizes = found["standard", "depth", "normal", "layers.*.mlp"]
    assert sizes == {2: (3.0, 1.0), 4: (6.0, 1.0)}
    assert slopes(sizes) == CoordinateSlopes(1.0, 0.0)
    assert len(failing(found, 0.3)) == 2


def test_a_users_module_is_checked_along_its_own_knob(tmp_path: Path) -> None:
    folder, printed = run_recipe(
        *("coord_check", tmp_path, f"model={{_target_: {__name__}.Wide, units: 16}}"),
        *("knobs.width=model.units", "widths=[16,64,256]", "depths=[]", "seeds=[1]", "schemes=[standard,umup]"),
    )
    assert "12/12" in printed
    rows = [line.split("│") for line in (folder / "coord_check.txt").read_text().splitlines() if "normal" in line]
    starts = {row[1].strip(): row[5].split() for row in rows}
    assert starts["standard"][1] in ("layer", "head")
    assert float(starts["standard"][0]) == pytest.approx(0.5, abs=0.1)  # √width
    assert float(starts["umup"][0]) == pytest.approx(0, abs=0.1)
    assert "Coordinate check" in (folder / "coord_check.html").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["widths=[]", "depths=[]"], "nothing to check"),
        (["widths=[32]", "depths=[]"], "a slope needs two sizes"),
        (["knobs.width=model.hidden"], r"knobs\.width=model\.hidden: the model has no such setting"),
        (["schemes=[mup]"], "'mup' is not known"),
        ([f"model={{_target_: {__name__}.Manual, units: 4}}", "knobs.width=model.units"], "by hand"),
        (["model={_target_: torch.nn.Linear, in_features: 4, out_features: 4}",
          "knobs.width=model.in_features"], "makes a Linear, not a LightningModule"),
    ],
)  # fmt: skip
def test_what_can_not_be_checked_is_named(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run_recipe("coord_check", tmp_path, *overrides)
