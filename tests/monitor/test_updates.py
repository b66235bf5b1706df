"""Sizes of updates, their alignment with activations, and kurtosis, against closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.training import fit
from torch import nn

from lightning_unitscale import ScaleMonitor, UnitScaling
from lightning_unitscale.engine.runtime.operand_statistics import Accumulator
from lightning_unitscale.monitor import Snapshot
from lightning_unitscale.monitor.scalars import every_site, summary
from lightning_unitscale.monitor.updates import alignment_of, copies_of, updates_since


def test_an_update_along_the_input_is_fully_aligned_and_a_random_one_is_not() -> None:
    torch.manual_seed(0)
    x = torch.ones(4, 256)
    assert alignment_of(torch.full((8, 256), 1e-3), x) == pytest.approx(1)
    assert alignment_of(torch.randn(4096, 256), torch.randn(256, 256)) == pytest.approx(0.5, abs=0.005)
    assert alignment_of(torch.zeros(8, 256), x) is None


def test_relative_sizes_of_a_known_step() -> None:
    layer = nn.Linear(4, 2)
    nn.init.constant_(layer.weight, 2.0)
    nn.init.zeros_(layer.bias)
    before = copies_of(layer)
    with torch.no_grad():
        layer.weight -= 0.5
        layer.bias += 1
    weight, bias = updates_since(before, layer, {"weight": torch.ones(3, 4)}, {"weight": "readout"})
    assert (weight.role, weight.update, weight.weight, weight.relative) == ("readout", 0.5, 2.0, 0.25)
    assert weight.alignment == pytest.approx(1)
    assert (bias.update, bias.weight, bias.relative, bias.alignment) == (1.0, 0.0, None, None)


@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15])
def test_kurtosis_is_that_of_the_distribution_at_any_scale(scale: float) -> None:
    torch.manual_seed(0)
    one_outlier = torch.zeros(64)
    one_outlier[3] = 5
    cases = {3.0: torch.randn(200_000), 1.8: torch.rand(200_000) * 2 - 1, 1.0: torch.ones(64), 64.0: one_outlier}
    for kurtosis, values in cases.items():
        accumulator = Accumulator(torch.float16)
        accumulator.add(values[: len(values) // 2] * scale)
        accumulator.add(values[len(values) // 2 :] * scale)
        assert accumulator.result().kurtosis == pytest.approx(kurtosis, rel=0.03)


def test_a_trained_step_is_measured_with_the_roles_of_the_plan(tmp_path: Path) -> None:
    fit(tmp_path, UnitScaling(), ScaleMonitor(folder=tmp_path), max_steps=1)
    (snapshot,) = Snapshot.read(tmp_path / "monitor.jsonl")
    assert {update.role for update in snapshot.updates} >= {"hidden", "readout"}
    aligned = [update.alignment for update in snapshot.updates if update.alignment is not None]
    assert aligned and all(-1 < alignment < 1.001 for alignment in aligned)
    assert any(name.startswith("unitscale/update/hidden/relative") for name in summary(snapshot))
    assert all(f"unitscale/update/{update.parameter}/relative" in every_site(snapshot)
               for update in snapshot.updates if update.relative is not None)  # fmt: skip
