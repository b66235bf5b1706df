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
    assert "[2/2] umup-fp8, seed 1: " in printed
    table = (folder / "formats.txt").read_text()
    assert all(f"{row['held_out']:.3f}" in table for row in rows)
    assert f"{rows[1]['held_out'] / rows[0]['held_out'] - 1:+.2%}" in table

    rows[1]["held_out"] = None
    keys = ("variant", "seed", "settings", "held_out", "seconds")  # a line may have no curve
    lines = "\n".join(json.dumps({key: row[key] for key in keys}) for row in rows)
    (folder / "runs.jsonl").write_text(lines + "\n")
    _, printed = run_recipe("formats", tmp_path, *FEW)
    assert "/2]" not in printed
    assert "diverged" in printed
    assert f"{math.inf:.3f}" in printed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("only=[umpu]", "only=umpu: there are the variants umup, umup-bf16"),
        ('+variants.mine=["unitscale.foo=1"]', "variants.mine: Key 'foo' not in 'UnitScalingNode'"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        run_recipe("formats", tmp_path, override)
