"""What -m ends with."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from support.recipe_runs import run_recipe

from lightning_unitscale.cookbook.multirun import summary

QUICK = ("experiment=tiny", "trainer.enable_progress_bar=false", "trainer.limit_val_batches=1", "monitor=none")
LINE = re.compile(r"^ +(\d+)  (optimizer\.lr=\S+) +(\d+\.\d+)(  best)?$", re.MULTILINE)


def test_each_run_has_a_line_with_its_own_overrides_and_its_score(tmp_path: Path) -> None:
    settings = [*QUICK, "logger=csv", "hydra.sweep.dir=runs", "-m", "optimizer.lr=1e-4,1e-2"]
    _, printed = run_recipe("pretrain", tmp_path, *settings)
    lines = LINE.findall(printed)
    assert [(number, override) for number, override, *_ in lines] == [
        ("0", "optimizer.lr=0.0001"),
        ("1", "optimizer.lr=0.01"),
    ]
    shown = [float(loss) for loss in re.findall(r"^val/loss +(\d+\.\d+)$", printed, re.MULTILINE)]
    assert [float(score) for *_, score, _ in lines] == pytest.approx(shown, abs=1e-3)
    assert [bool(mark) for *_, mark in lines] == [loss == min(shown) for loss in shown]


def test_one_run_alone_has_no_summary(tmp_path: Path) -> None:
    run, printed = run_recipe("pretrain", tmp_path, *QUICK, "logger=csv")
    assert " runs in " not in printed
    assert not (run / ".hydra" / "score.yaml").exists()


@pytest.mark.parametrize(("mode", "best"), [("min", "1"), ("max", "2")])
def test_the_best_is_a_number_by_the_recipes_mode(mode: str, best: str) -> None:
    runs = {
        "1": (["a=1", "b=1"], 0.5),
        "2": (["a=2", "b=1"], 0.75),
        "3": (["a=3", "b=1"], math.nan if mode == "min" else math.inf),
    }
    (line,) = (line for line in summary(Path("runs"), runs, mode).splitlines() if line.endswith("best"))
    assert line.split()[:2] == [best, f"a={best}"]


def test_a_run_with_wrong_input_leaves_the_others_running_and_is_named_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = [*QUICK, "logger=csv", "hydra.sweep.dir=runs", "-m", "model.width=32,48,64"]  # heads of 32
    with pytest.raises(SystemExit, match="error: of these runs 1 failed; what was wrong is said above"):
        run_recipe("pretrain", tmp_path, *settings)
    said = capsys.readouterr().err
    assert re.search(
        r"error: run 1 \(.*model\.width=48\): model\.width=48 is not a multiple of model\.head_width", said
    )
    done = [number for number in ("0", "1", "2") if (tmp_path / "runs" / number / "report" / "metrics.json").is_file()]
    assert done == ["0", "2"]
