"""The FP8 benchmark where there is no GPU: that all of it runs, what it counts, and that wrong settings are named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from support.recipe_runs import run_recipe

from lightning_unitscale.cookbook.measuring import fp8_comparison
from lightning_unitscale.cookbook.measuring.fp8_comparison import compare_variants, configured_cases
from lightning_unitscale.engine.runtime.install import casts_in_force

SMALL = ["device=cpu", "linears=[[64,32,48]]", "blocks=[[64,16]]", "rounds=2", "warm_up=1"]


def test_every_variant_gets_a_row(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    folder, printed = run_recipe("fp8_benchmark", tmp_path, *SMALL, "modes=[eager]")
    rows = json.loads((folder / "fp8_benchmark.json").read_text())["rows"]
    variants = ["bf16", "static", "torchao-tensorwise", "torchao-rowwise"]
    assert [(row["case"], row["variant"]) for row in rows] == [
        (case, variant) for case in ("linear 64x32x48", "Llama block 64, 16 tokens") for variant in variants
    ]
    assert not any(row["error"] for row in rows)
    assert all(row["milliseconds"] > 0 for row in rows)
    assert all(row["ratio"] == 1 for row in rows if row["variant"] == "bf16")
    saved = {row["variant"]: row["saved"] * 2**20 for row in rows[:4]}
    elements = 64 * 32 + 32 * 48
    assert saved["bf16"] == 2 * elements
    assert saved["static"] == elements + 7 * 4  # half of it, and the scales
    assert "torchao-rowwise" in printed
    assert "CPU, torch" in (folder / "fp8_benchmark.txt").read_text()


@pytest.mark.slow
def test_compiled_variants_run(tmp_path: Path) -> None:
    folder, _ = run_recipe("fp8_benchmark", tmp_path, *SMALL, "modes=[compiled]", "variants=[bf16,static]", "blocks=[]")
    assert not any(row["error"] for row in json.loads((folder / "fp8_benchmark.json").read_text())["rows"])


def test_weights_are_cast_in_every_step_and_gradients_are_in_range() -> None:
    cfg = OmegaConf.create({"device": "cpu", "dtype": "bfloat16", "linears": [[64, 32, 48]], "blocks": []})
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
    settings = {"device": "cpu", "dtype": "bfloat16", "linears": [[64, 32, 48]], "blocks": []}
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
        ("rounds=0", "rounds=0 must be a positive whole number"),
        ("device=cuda", "device=cuda: this machine has no CUDA device"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str, tmp_path: Path) -> None:
    if override == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match=re.escape(message)):
        run_recipe("fp8_benchmark", tmp_path, *SMALL, override)
