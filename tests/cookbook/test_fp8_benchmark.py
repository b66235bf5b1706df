"""The FP8 benchmark where there is no GPU: that all of it runs, what it counts, and that wrong settings are named."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from support.recipe_runs import run_recipe
from torch import nn

from lightning_unitscale.cookbook.measuring import fp8_comparison
from lightning_unitscale.cookbook.measuring.fp8_comparison import compare_variants, configured_cases
from lightning_unitscale.cookbook.measuring.fp8_linear import InTransformerEngine
from lightning_unitscale.cookbook.measuring.time_to_loss import Race
from lightning_unitscale.engine.runtime.install import casts_in_force

RACE = ["race.width=32", "race.depth=1", "race.tokens=32", "race.batch=4", "race.steps=6", "race.every=3"]
SMALL = ["device=cpu", "linears=[[64,32,48]]", "blocks=[[64,16]]", "moe=[[64,16]]", "rounds=2", "warm_up=1", *RACE]


def test_every_variant_gets_a_row(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    folder, printed = run_recipe("fp8_benchmark", tmp_path, *SMALL, "modes=[eager]")
    numbers = json.loads((folder / "fp8_benchmark.json").read_text())
    rows = numbers["rows"]
    variants = ["bf16", "static", "torchao-tensorwise", "torchao-rowwise", "transformer-engine"]
    cases = ("linear 64x32x48", "Llama block 64, 16 tokens", "MoE block 64, 16 tokens")
    assert [(row["case"], row["variant"]) for row in rows] == [
        (case, variant) for case in cases for variant in variants
    ]
    assert {row["variant"] for row in rows if row["error"]} == {"transformer-engine"}  # not installed
    measured = [row for row in rows if not row["error"]]
    assert all(row["milliseconds"] > 0 for row in measured)
    assert all(row["ratio"] == 1 for row in measured if row["variant"] == "bf16")
    saved = {row["variant"]: row["saved"] * 2**20 for row in measured[:4]}
    elements = 64 * 32 + 32 * 48
    assert saved["bf16"] == 2 * elements
    assert saved["static"] == elements + 7 * 4  # half of it, and the scales
    races = {each["variant"]: each for each in numbers["races"]}
    assert {name for name, each in races.items() if each["error"]} == {"transformer-engine"}
    for name in variants[:-1]:
        (start, first), _, (seconds, last) = races[name]["losses"]
        assert start == 0
        assert seconds > 0
        assert last < first
    assert races["static"]["losses"][0][1] == pytest.approx(races["bf16"]["losses"][0][1], rel=1e-2)
    assert "torchao-rowwise" in printed
    assert "race: a Llama of width 32" in printed
    assert "CPU, torch" in (folder / "fp8_benchmark.txt").read_text()


def test_it_ends_when_its_minutes_are_over(tmp_path: Path) -> None:
    options = ["modes=[eager]", "variants=[bf16,static]", "minutes=1e-9"]
    folder, printed = run_recipe("fp8_benchmark", tmp_path, *SMALL, *options)
    numbers = json.loads((folder / "fp8_benchmark.json").read_text())
    assert [row["error"] for row in numbers["rows"]] == ["left out: minutes=1e-09 are over"] * 3
    assert [each["error"] for each in numbers["races"]] == ["out of time after 0 of 6 steps"] * 2
    assert "left out" in printed


def test_the_same_loss_is_the_one_that_all_reach() -> None:
    fast, good = Race("a", [(0.0, 5.0), (1.0, 3.0), (2.0, 2.5)]), Race("b", [(0.0, 5.0), (3.0, 2.4), (6.0, 2.0)])
    assert (fast.seconds_to(2.5), good.seconds_to(2.5), fast.seconds_to(2.0)) == (2.0, 3.0, None)


def test_linear_layers_become_transformer_engine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that can't be installed without a GPU, in the form that is used of it."""
    entered: list[bool] = []

    class EngineLinear(nn.Linear):
        def __init__(self, inputs: int, outputs: int, bias: bool, params_dtype: torch.dtype) -> None:
            super().__init__(inputs, outputs, bias, dtype=params_dtype)

    @contextmanager
    def fp8_autocast(enabled: bool) -> Iterator[None]:
        entered.append(enabled)
        yield

    engine = SimpleNamespace(Linear=EngineLinear, fp8_autocast=fp8_autocast)
    monkeypatch.setitem(sys.modules, "transformer_engine", SimpleNamespace(pytorch=engine))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    plain, x = nn.Sequential(nn.Linear(8, 16), nn.Sequential(nn.Linear(16, 4, bias=False))), torch.randn(3, 8)
    y = plain(x)
    replaced = InTransformerEngine(plain)
    assert torch.equal(replaced(x), y)
    assert entered == [True]
    assert sum(isinstance(module, EngineLinear) for module in replaced.modules()) == 2


@pytest.mark.slow
def test_compiled_variants_run(tmp_path: Path) -> None:
    folder, _ = run_recipe(
        "fp8_benchmark",
        tmp_path,
        *SMALL,
        "modes=[compiled]",
        "variants=[bf16,static]",
        "blocks=[]",
        "moe=[]",
        "race.steps=0",
    )
    assert not any(row["error"] for row in json.loads((folder / "fp8_benchmark.json").read_text())["rows"])


def test_weights_are_cast_in_every_step_and_gradients_are_in_range() -> None:
    cfg = OmegaConf.create({"device": "cpu", "dtype": "bfloat16", "linears": [[64, 32, 48]], "blocks": [], "moe": []})
    (case,) = configured_cases(cfg)
    step = case.variant("static", "eager")
    (site,) = casts_in_force(step.module).values()
    kept = []
    for _ in range(2):
        step.milliseconds()
        kept.append(site._weight.narrow)
    assert kept[0] is not kept[1]
    sizes = site.scales["gradient"] * step.gradient.float().square().mean().sqrt()
    assert 0.5 <= float(sizes) <= 2


def test_a_variant_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(fp8_comparison, "with_torchao", fails)
    settings = {"device": "cpu", "dtype": "bfloat16", "linears": [[64, 32, 48]], "blocks": [], "moe": []}
    cfg = OmegaConf.create({**settings, "variants": ["bf16", "torchao-rowwise"], "rounds": 1, "warm_up": 0})
    plain, failed = compare_variants(configured_cases(cfg)[0], "eager", cfg)
    assert plain.milliseconds > 0
    assert (failed.milliseconds, failed.error) == (None, "RuntimeError: no kernel")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("variants=[bf17]", "variants: 'bf17' is not known; choose from bf16, static"),
        ("modes=[fast]", "modes: 'fast' is not known; choose from eager, compiled"),
        ("linears=[[64,64]]", "linears: [64, 64] must be 3 positive whole numbers"),
        ("blocks=[[64,0]]", "blocks: [64, 0] must be 2 positive whole numbers"),
        ("moe=[[64]]", "moe: [64] must be 2 positive whole numbers"),
        ("race.width=0", "race.width=0 must be a positive whole number"),
        ("minutes=0", "minutes=0 must be above 0"),
        ("modes=[]", "modes=[]: choose from eager, compiled"),
        ("rounds=0", "rounds=0 must be a positive whole number"),
        ("device=cuda", "device=cuda: this machine has no CUDA device"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str, tmp_path: Path) -> None:
    if override == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match=re.escape(message)):
        run_recipe("fp8_benchmark", tmp_path, *SMALL, override)
