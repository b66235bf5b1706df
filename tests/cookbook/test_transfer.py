"""The transfer recipe: what it runs, that a stopped sweep goes on, and what it concludes from given results."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from lightning_unitscale import cli
from lightning_unitscale.cookbook import config
from lightning_unitscale.cookbook.learning_rates.chart import transfer_chart
from lightning_unitscale.cookbook.learning_rates.findings import best_of, findings
from lightning_unitscale.cookbook.learning_rates.grid import RateRun, configuration, planned_runs
from lightning_unitscale.cookbook.learning_rates.tables import drop_in_table, transfer_table
from lightning_unitscale.cookbook.sweeps.results import Result, append_result, read_results
from lightning_unitscale.cookbook.sweeps.sweep import measure_pretraining, settings_hash

FEW = ["sweep.points=[32]", "sweep.umup=[0]", "sweep.standard=[-8]", "sweep.fan_in=[-8]", "trainer.max_steps=2"]


def composed(name: str, *overrides: str) -> DictConfig:
    config.register()
    with initialize_config_dir(str(config.shipped("conf")), version_base="1.3"):
        return compose(name, overrides=["trainer.default_root_dir=.", *overrides])


def command(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["unitscale", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    GlobalHydra.instance().clear()
    cli.main()


# --- the runs ---------------------------------------------------------------------------------------------------------


def test_plan_of_the_full_sweep() -> None:
    sweep = composed("transfer").sweep
    runs = planned_runs(sweep)
    assert len(runs) == len(set(runs))
    count = len(sweep.points) * (len(sweep.standard) + len(sweep.fan_in) + len(sweep.umup))
    count += 2 * len(sweep.drop_in.points) * len(sweep.drop_in.learning_rates)
    assert len(runs) == len(sweep.seeds) * count
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)


def test_parametrizations_differ_in_what_they_should() -> None:
    cfg = composed("transfer")
    standard, fan_in, umup, drop_in = (
        configuration(cfg, RateRun(name, "width", 128, 0.5, 2)) for name in ("standard", "fan-in", "umup", "drop-in")
    )
    assert standard.unitscale is None
    assert (umup.unitscale.lr_units, drop_in.unitscale.lr_units) == ("umup", "standard")
    assert standard.optimizer == drop_in.optimizer
    assert fan_in.unitscale is None
    assert (standard.model.initial, fan_in.model.initial) == ("own", "fan_in")
    for run in (standard, fan_in, umup, drop_in):
        assert (run.model.config.hidden_size, run.optimizer.lr, run.seed) == (128, 0.5, 2)
        assert run.optimizer.betas == cfg.optimizer.betas
    # What weight decay takes off in a step is the same at the learning rates that the two are made for.
    assert umup.optimizer.weight_decay == standard.optimizer.weight_decay == 0


def test_hash_covers_what_decides_the_result_and_nothing_else() -> None:
    cfg, run = composed("transfer"), RateRun("umup", "width", 64, 1.0, 1)

    def key(name: str = "threads", value: object = 1) -> str:
        changed = cfg.copy()
        OmegaConf.update(changed, name, value)
        return settings_hash(configuration(changed, run))

    assert key() == key("sweep.points", [64]) == key("trainer.default_root_dir", "elsewhere")
    deciding = {"model.depth": 2, "unitscale.storage": "unit", "data.batch_size": 4, "schedule.final": 0}
    assert len({key(), *(key(*item) for item in deciding.items())}) == 1 + len(deciding)


def test_a_run_is_that_of_the_pretrain_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["experiment=tiny", "unitscale.lr_units=umup", "optimizer.lr=0.5", "seed=3"]
    command(tmp_path, monkeypatch, "pretrain", *overrides)
    (metrics,) = tmp_path.glob("outputs/pretrain/*/report/metrics.json")
    measured = measure_pretraining(composed("pretrain", *overrides))
    assert measured.held_out == json.loads(metrics.read_text())["val/loss"]
    assert len(measured.curve) == 1


def test_a_stopped_sweep_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command(tmp_path, monkeypatch, "transfer", "sweep=quick", *FEW)
    folder = tmp_path / "outputs" / "transfer" / "quick_adamw_no_decay"
    lines = (folder / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 5
    assert capsys.readouterr().out.count("[5/5] drop-in") == 1
    first = json.loads((folder / "transfer.json").read_text())["runs"]
    assert [run["held_out"] > 0 for run in first] == [True] * 5
    assert (folder / "transfer.png").stat().st_size > 0
    assert "Best held-out loss" in (folder / "transfer.txt").read_text()

    command(tmp_path, monkeypatch, "transfer", "sweep=quick", *FEW)
    assert "/5]" not in capsys.readouterr().out

    (folder / "runs.jsonl").write_text("\n".join([*lines[:4], lines[4][:50]]))  # stopped while it wrote
    command(tmp_path, monkeypatch, "transfer", "sweep=quick", *FEW)
    assert "[1/1] drop-in" in capsys.readouterr().out
    again = json.loads((folder / "transfer.json").read_text())["runs"]
    assert [run["held_out"] for run in again] == [run["held_out"] for run in first]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("unitscale=none", "needs unitscale=umup"),
        ("~model.initial", r"sweep\.fan_in=\[\]"),
        ("sweep.seeds=[]", "the sweep is empty"),
        ("sweep.points=[48]", r"model\.width=48 is not a multiple of model\.head_width=32"),
        ("sweep=fast", "sweep=fast is not known; choose one of batch, depth, quick, sequence, steps, width"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = [] if override.startswith("sweep=") else ["sweep=quick"]
    with pytest.raises(SystemExit, match=message):
        command(tmp_path, monkeypatch, "transfer", *quick, override)


# --- what the results say ---------------------------------------------------------------------------------------------


def results(losses: dict[tuple[str, int, float], list[float]]) -> list:
    return [
        Result(RateRun(name, "width", width, rate, seed), "", loss)
        for (name, width, rate), all_ in losses.items()
        for seed, loss in enumerate(all_)
    ]


def test_best_is_that_of_the_mean_over_whole_sets_of_seeds() -> None:
    found = results(
        {
            ("umup", 64, 0.25): [1.9, 1.9],
            ("umup", 64, 0.5): [1.5, 1.8],
            ("umup", 64, 1.0): [1.6, 1.6],
            ("umup", 64, 2.0): [1.0, math.inf],  # one seed diverged
            ("umup", 64, 4.0): [0.9],  # a seed is missing
            ("umup", 64, 0.003): [0.5, 0.5],  # not on the grid
        },
    )
    best = best_of(found, "umup", 64)
    assert (best.learning_rate, best.losses, best.at_edge) == (1.0, (1.6, 1.6), False)
    assert best_of(found, "umup", 128) is None
    assert best_of(found[:4], "umup", 64).at_edge


def test_findings() -> None:
    cfg = composed("transfer", "sweep.points=[64,128]", "sweep.drop_in.points=[64]")
    good = {
        ("standard", 64, 2**-8): [1.9],
        ("standard", 64, 2**-9): [2.0],
        ("standard", 128, 2**-8): [2.0],
        ("standard", 128, 2**-9): [1.8],
        ("umup", 64, 1.0): [1.7],
        ("umup", 128, 0.5): [1.6],
        ("standard", 64, 3e-3): [2.0],
        ("drop-in", 64, 3e-3): [2.05],
    }
    assert [holds for holds, _ in findings(cfg, results(good))] == [True] * 5
    bad = {**good, ("umup", 128, 0.25): [1.4], ("umup", 64, 1.0): [1.3], ("drop-in", 64, 3e-3): [2.2]}
    shown = list(findings(cfg, results(bad)))
    assert [holds for holds, _ in shown] == [True, False, True, False, False]
    assert "(2^2)" in shown[1][1]
    assert "+0.100 nats" in shown[3][1]
    assert "worst +0.200" in shown[4][1]
    assert list(findings(cfg, [])) == []
    stronger = list(findings(cfg, results({**good, ("fan-in", 128, 2**-8): [1.5]})))
    assert not stronger[0][0]
    assert "128: -0.100" in stronger[0][1]


def test_a_result_survives_its_line(tmp_path: Path) -> None:
    file, run = tmp_path / "runs.jsonl", RateRun("umup", "width", 64, 2.0, 1)
    for loss in (1.25, math.inf):
        result = Result(run, "abc", loss, curve=[2.0, None], seconds=3.0)
        append_result(file, result)
        assert read_results(file, {run: "abc"}) == {run: result}
        assert "Infinity" not in file.read_text()


def test_a_partial_sweep_is_drawn() -> None:
    cfg = composed("transfer")
    for found in ([], results({("umup", 64, 1.0): [math.inf], ("drop-in", 64, 1e-3): [1.0, 1.2]})):
        transfer_chart(cfg, found).canvas.draw()
        transfer_table(cfg, found)
        drop_in_table(cfg, found)


def test_only_what_was_run_is_drawn() -> None:
    cfg = composed("transfer", "sweep.drop_in.points=[]")
    found = results({("umup", 64, 1.0): [1.5], ("standard", 64, 2.0**-8): [1.9]})
    titles = [axes.get_title() for axes in transfer_chart(cfg, found).axes]
    assert titles == ["Untouched, initial std 0.02", 'UnitScaling(lr_units="umup")']
