"""`unitscale tasks`: which runs it makes, that each is made once, and what its table says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from support.recipe_runs import run_recipe

from lightning_unitscale.cookbook.config import register, shipped
from lightning_unitscale.cookbook.learning_rates.grid import RateRun
from lightning_unitscale.cookbook.runs import check
from lightning_unitscale.cookbook.sweeps.results import Result
from lightning_unitscale.cookbook.task_table.findings import claims, task_rows
from lightning_unitscale.cookbook.task_table.grid import configuration, first_runs, last_runs, runs_beyond, score_of
from lightning_unitscale.cookbook.task_table.tables import markdown
from lightning_unitscale.errors import InputError

SWEEP = {
    "tasks": ["talk"],
    "seeds": [1, 2],
    "variants": {
        "standard": {"settings": [], "rates": [-3, -2]},
        "umup": {"settings": [], "rates": [0, 1, 2]},
        "drop-in": {"settings": [], "rates": []},
    },
}
TASK = {"task": {"monitor": "val/loss", "mode": "min", "score": {"name": "test/right", "mode": "max"}}}


def result(variant: str, exponent: int, seed: int, held_out: float, right: float) -> Result[RateRun]:
    run = RateRun(variant, "task", "talk", 2.0**exponent, seed)
    return Result(run, f"{run}", held_out, scores={"test/right": right})


GRID = [
    result("standard", -3, 1, 2.0, 0.5),
    result("standard", -2, 1, 3.0, 0.9),  # better in the test, which is not what the rate is chosen by
    result("umup", 0, 1, 2.0, 0.1),
    result("umup", 1, 1, 1.5, 0.6),
    result("umup", 2, 1, math.inf, math.nan),
]


def test_the_first_seed_has_the_grid_and_the_others_the_best() -> None:
    cfg = OmegaConf.create(SWEEP)
    assert {(run.parametrization, run.learning_rate, run.seed) for run in first_runs(cfg)} == {
        *(("standard", rate, 1) for rate in (0.125, 0.25)),
        *(("umup", rate, 1) for rate in (1.0, 2.0, 4.0)),
    }
    (beyond,) = runs_beyond(cfg, GRID)  # standard's best is at an edge, umup's is not
    assert (beyond.parametrization, beyond.learning_rate) == ("standard", 0.0625)
    assert {(run.parametrization, run.learning_rate) for run in last_runs(cfg, GRID) if run.seed == 2} == {
        ("standard", 0.125),
        ("umup", 2.0),
        ("drop-in", 0.125),
    }


def test_the_rate_is_chosen_by_validation_and_the_table_has_the_test() -> None:
    results = [
        *GRID,
        result("standard", -3, 2, 2.2, 0.7),
        result("umup", 1, 2, 1.5, 0.8),
        result("drop-in", -3, 1, 1.8, 0.4),
        result("drop-in", -3, 2, 1.8, 0.3),
    ]
    cfg: Any = OmegaConf.create(SWEEP)
    (row,) = task_rows(cfg, results, dict.fromkeys((one.run for one in results), OmegaConf.create(TASK)))
    assert row.cells["standard"].mean == pytest.approx(0.6)
    assert row.holds("umup") is True  # 0.7 where more is better
    assert row.holds("drop-in") is False  # 0.35, and the seeds differ by 0.1 to either side
    assert [(holds, text.endswith("worse: talk")) for holds, text in claims([row], cfg.variants)] == [
        (True, False),
        (False, True),
    ]
    head, _, line = markdown([row], list(cfg.variants)).splitlines()
    assert head == "| task | score | standard | umup | drop-in | seeds |"
    assert line == ("| talk | right ↑ | 0.600 ± 0.100 at 2^-3* | 0.700 ± 0.100 at 2^1 | 0.350 ± 0.050 at 2^-3 NO | 2 |")


def test_a_run_that_diverged_is_worse() -> None:
    results = [GRID[0], GRID[4]]
    cfg = OmegaConf.create(SWEEP)
    (row,) = task_rows(cfg, results, dict.fromkeys((one.run for one in results), OmegaConf.create(TASK)))
    assert row.holds("umup") is False
    assert "diverged" in markdown([row], ["umup"])


def test_a_task_without_a_score_of_its_own_is_compared_by_what_it_monitors() -> None:
    assert score_of(OmegaConf.create({"task": {"monitor": "val/map", "mode": "max"}})) == ("test/map", "max")
    with pytest.raises(InputError, match="mode=best is not known"):
        score_of(OmegaConf.create({"task": {"score": {"name": "test/map", "mode": "best"}}}))


def test_every_task_of_the_list_can_be_run() -> None:
    register()
    with initialize_config_dir(str(shipped("conf")), version_base="1.3"):
        cfg = compose("tasks")
        runs = [run for run in first_runs(cfg) if run.learning_rate in (1.0, 2.0**-8)]
        assert list(dict.fromkeys(run.value for run in runs)) == list(cfg.tasks)
        for run in runs[:2] + [run for run in runs[2:] if run.parametrization == "umup"]:
            composed = configuration(cfg, run)
            check(composed)
            assert (composed.unitscale is None) == (run.parametrization == "standard")
            assert composed.optimizer.lr == run.learning_rate
            assert score_of(composed)[0].startswith("test/")
        drop_in = configuration(cfg, replace(runs[0], parametrization="drop-in"))
        assert (drop_in.unitscale.scheme, drop_in.unitscale.lr_units) == ("umup", "standard")


SMALL = [
    "tasks=[seq2seq]",
    "variants.standard.rates=[-9]",
    "variants.umup.rates=[0]",
    "beyond=0",
    "settings=['trainer.max_steps=2','trainer.limit_val_batches=1','+trainer.limit_test_batches=1','data.batch_size=2',"
    "'schedule.warmup_steps=1','model.config.d_model=16','model.config.d_ff=16','model.config.num_layers=1',"
    "'model.config.num_decoder_layers=1','data.pairs.max_length=6']",
]


@pytest.mark.slow
def test_a_sweep_goes_on_and_a_finished_run_is_not_made_again(tmp_path: Path) -> None:
    folder, printed = run_recipe("tasks", tmp_path, *SMALL, "seeds=[1]")
    assert printed.count(", seed 1: ") == 3
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert [row["run"]["parametrization"] for row in rows] == ["standard", "umup", "drop-in"]
    assert all("test/character_error_rate" in row["scores"] for row in rows)
    assert "character_error_rate ↓" in (folder / "tasks.md").read_text()
    assert (folder / "seq2seq.png").is_file()
    page = (folder / "tasks.html").read_text()
    assert "umup is not worse" in page or "1 of 1" in page
    _, printed = run_recipe("tasks", tmp_path, *SMALL, "seeds=[1,2]")
    assert printed.count(", seed 1: ") == 0
    assert printed.count(", seed 2: ") == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["tasks=[]"], "tasks is empty"),
        (["tasks=[nothing_like_it]"], "nothing_like_it"),
        (["tasks=[seq2seq]", "variants.standard.rates=[]", "variants.umup.rates=[]"], "rates are all empty"),
        (["tasks=[seq2seq]", "settings=['trainer.max_steps=0']"], "trainer.max_steps=0 must be a positive"),
    ],
)
def test_bad_settings_are_named_before_a_run(settings: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as raised:
        run_recipe("tasks", tmp_path, *settings)
    assert message in str(raised.value)
