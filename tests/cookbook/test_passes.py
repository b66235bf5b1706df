"""Counting passes and bytes: closed forms, and the layer that is counted against the one that users get."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from torch import nn

from lightning_unitscale import cli, unit_scale
from lightning_unitscale.cookbook import config
from lightning_unitscale.cookbook.measuring.pass_counter import PassCounter

SIZE = 64
SQUARE = SIZE * SIZE


@pytest.fixture(scope="module")
def passes() -> Iterator[ModuleType]:
    folder = str(config.shipped("recipes"))
    sys.path.insert(0, folder)
    yield importlib.import_module("passes")
    sys.path.remove(folder)


def test_counts_what_moves_and_nothing_else() -> None:
    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE, dtype=torch.bfloat16)
    with PassCounter(SQUARE) as counter:
        a.view(SQUARE).t()  # views
        torch.empty_like(a)  # no values
        a[0] * 2  # small
        a * 2
        a.mul_(2)
        b.float()
        a.sum()
    moved = [moved / SQUARE for _, moved in counter.passes]
    assert moved[:3] == [8, 8, 6]  # read and written: float32, float32 in place, from bfloat16 to float32
    assert moved[3] == pytest.approx(4, abs=0.01)
    assert len(moved) == 4


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_bf16_is_three_products(passes: ModuleType, device: str) -> None:
    counter = passes.count("bf16", SIZE, device)
    assert [moved for _, moved in counter.passes] == [3 * 2 * SQUARE] * 3


def test_static_reads_each_operand_once(passes: ModuleType) -> None:
    """The limit: three operands written in both layouts (2 + 1 + 1 bytes an element), three products (1 + 1 + 2)."""
    counter = passes.count("static", SIZE, "meta")
    names = [name.partition(".")[2].partition(".")[0] for name, _ in counter.passes]
    assert sorted(names) == ["_scaled_mm_v2"] * 3 + ["fp8_cast"] * 3
    assert counter.bytes == pytest.approx(6 * 4 * SQUARE, rel=1e-3)  # and 0-dim scales


def test_the_static_layer_is_what_unit_scaling_runs(passes: ModuleType) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16))
    x = torch.randn(SIZE, SIZE, dtype=torch.bfloat16, requires_grad=True)
    unit_scale(layer, lambda m: m(x).float().square().mean(), scheme="preserve", format="fp8")
    with PassCounter(SQUARE) as counter:
        layer(x).backward(x.detach())
    assert sorted(counter.passes) == sorted(passes.count("static", SIZE, "cpu").passes)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_static_moves_less_than_torchao(passes: ModuleType, device: str) -> None:
    pytest.importorskip("torchao")
    static, torchao = (passes.count(layer, SIZE, device) for layer in ("static", "torchao"))
    assert len(static.passes) < len(torchao.passes) / 2
    assert static.bytes < torchao.bytes / 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("size=100", "size=100 must be a positive multiple of 16"),
        ("device=cuda", "device=cuda must be meta or cpu"),
        ("layers=[bf17]", "'bf17' is not known; choose from bf16, static, torchao"),
    ],
)
def test_bad_input(override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["unitscale", "passes", override])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit, match=message.replace("[", r"\[")):
        cli.main()
    assert not list(tmp_path.iterdir())
