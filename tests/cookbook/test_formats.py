"""The formats recipe: one row a variant, finished runs are kept, wrong settings are named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from support.recipe_runs import run_recipe

FEW = ["experiment=tiny", "seeds=[1]", "only=[umup,umup-fp8]"]


def test_every_variant_gets_a_row_and_is_run_once(tmp_path: Path) -> None:
    folder, printed = run_recipe("formats", tmp_path, *FEW)
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert [(row["variant"], row["seed"]) for row in rows] == [("umup", 1), ("umup-fp8", 1)]
    assert "[2/2] pretrain, umup-fp8, seed 1: " in printed
    table = (folder / "formats.txt").read_text()
    assert all(f"{row['held_out']:.4f}" in table for row in rows)
    assert f"{rows[1]['held_out'] / rows[0]['held_out'] - 1:+.2%}" in table

    rows[1]["held_out"] = None
    keys = ("variant", "seed", "settings", "held_out", "seconds")  # a line may have no curve
    lines = "\n".join(json.dumps({key: row[key] for key in keys}) for row in rows)
    (folder / "runs.jsonl").write_text(lines + "\n")
    _, printed = run_recipe("formats", tmp_path, *FEW)
    assert "/2]" not in printed
    assert "diverged" in printed
    assert f"{math.inf:.4f}" in printed


@pytest.mark.slow
def test_other_kinds_of_models_run_with_the_same_overrides(tmp_path: Path) -> None:
    sizes = ["small_jobs.language.steps=6", "small_jobs.unet.steps=3", "small_jobs.vit.steps=3"]
    only = ["seeds=[1]", "only=[umup,umup-nvfp4]", "jobs=[language,vit,unet]"]
    folder, printed = run_recipe("formats", tmp_path, *sizes, *only)
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert [(row["job"], row["variant"]) for row in rows] == [
        (job, variant) for job in ("language", "vit", "unet") for variant in ("umup", "umup-nvfp4")
    ]
    assert not any(row.get("error") for row in rows)
    plain, narrow = ([row["held_out"] for row in rows[start::2]] for start in (0, 1))
    assert [one != other for one, other in zip(plain, narrow, strict=True)] == [True, True, True]
    assert plain == pytest.approx(narrow, rel=0.1)
    assert "held-out score of SegmentationUNet, after 3 steps" in " ".join(printed.split())  # it wraps


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("jobs=[gan]", "jobs: 'gan' is not known; choose from pretrain, language, vit, unet"),
        ("only=[umpu]", "only=umpu: there are the variants umup, umup-bf16"),
        ('+variants.mine=["unitscale.foo=1"]', "variants.mine: Key 'foo' not in 'UnitScalingNode'"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        run_recipe("formats", tmp_path, override)
