"""The sweep recipe: independent search against closed forms; a tiny run that others can start from; wrong settings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from support.recipe_runs import run_recipe

from lightning_unitscale.cookbook import config
from lightning_unitscale.cookbook.sweeps.search import best_of, cost, independent_search, random_search
from lightning_unitscale.cookbook.sweeps.space import Point, read_space, with_point
from lightning_unitscale.errors import InputError

SPACE = {"lr": [1, 2, 4], "a": [0.5, 1.0, 2.0], "b": [1.0, 3.0]}
DEFAULT = {"lr": 1, "a": 1.0, "b": 1.0}


class Bowl:
    """A loss whose settings do not depend on one another, and what was asked of it."""

    def __init__(self, **best: float) -> None:
        self.best, self.asked = best, list[tuple[str, Point]]()

    def __call__(self, phase: str, points: Iterable[Point]) -> dict[Point, float]:
        points = list(points)
        self.asked += [(phase, point) for point in points]
        return {point: sum(math.log(value / self.best[name]) ** 2 for name, value in point) for point in points}


def test_independent_search_finds_the_best_of_settings_that_do_not_depend_on_one_another() -> None:
    bowl = Bowl(lr=2, a=2.0, b=3.0)
    found = independent_search(SPACE, "lr", DEFAULT, bowl)
    assert dict(best_of(found)) == {"lr": 2, "a": 2.0, "b": 3.0}
    assert len(bowl.asked) == cost(SPACE) == 3 + 2 + 1 + 1
    assert [phase for phase, _ in bowl.asked] == ["rate"] * 3 + ["alone"] * 3 + ["combined"]
    for phase, point in bowl.asked:
        changed = {name for name, value in point if value != DEFAULT[name]}
        assert changed <= ({"lr"} if phase == "rate" else {"lr", "a", "b"})
        assert phase != "alone" or (dict(point)["lr"] == 2 and len(changed - {"lr"}) == 1)


def test_what_is_worse_combined_is_not_chosen() -> None:
    def loss(point: Point) -> float:
        values = dict(point)
        return {0: 1.0, 1: 0.5, 2: 2.0}[(values["a"] != 1.0) + (values["b"] != 1.0)]

    found = independent_search(SPACE, "lr", DEFAULT, lambda _, points: {point: loss(point) for point in points})
    assert found[best_of(found)] == 0.5


def test_random_search_costs_as_much_and_never_tries_a_point_twice() -> None:
    bowl = Bowl(lr=2, a=2.0, b=3.0)
    found = random_search(SPACE, 1, bowl)
    assert len(found) == len(bowl.asked) == cost(SPACE)
    assert all(value in SPACE[name] for point in found for name, value in point)
    assert random_search(SPACE, 1, bowl) == found
    assert random_search(SPACE, 2, bowl) != found
    everything = random_search({"lr": [1, 2]}, 1, bowl)
    assert len(everything) == 2


def test_a_grid_without_a_rate_that_trains_ends_the_search_after_the_rates() -> None:
    asked: list[str] = []

    def diverges(phase: str, points: Iterable[Point]) -> dict[Point, float]:
        asked.append(phase)
        return dict.fromkeys(points, math.inf)

    with pytest.raises(InputError, match=r"with none of lr=1,2,4 does the model train"):
        independent_search(SPACE, "lr", DEFAULT, diverges)
    assert asked == ["rate"]


def test_values_are_lists_or_hydra_s_sweeps() -> None:
    tree = {"optimizer": {"lr": "1,2.5", "name": "choice(a,b)"}, "n": "range(1,4)", "left": None, "one": [3]}
    assert read_space(tree) == {"optimizer.lr": [1, 2.5], "optimizer.name": ["a", "b"], "n": [1, 2, 3], "one": [3]}


TINY = [
    *("experiment=tiny", "threads=1", "params.unitscale.hyperparameters=null", "params.optimizer.lr=[0.5,1]"),
    "+params.model.depth=[1,2]",
]


def test_a_sweep_runs_each_point_once_and_writes_an_experiment(tmp_path: Path) -> None:
    folder, printed = run_recipe("sweep", tmp_path, *TINY)
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert len({row["settings"] for row in rows}) == len(rows) <= 4
    best = min(rows, key=lambda row: row["held_out"])
    assert f"{best['held_out']:.3f}" in (folder / "sweep.txt").read_text()
    assert "is at the edge of its values" in printed
    _, again = run_recipe("sweep", tmp_path, *TINY)
    assert "[1/" not in again

    config.register()
    with initialize_config_dir(str(config.shipped("conf")), version_base="1.3"):
        overrides = ["+experiment=chosen", f"hydra.searchpath=[file://{folder.resolve()}]"]
        cfg = compose("pretrain", overrides=[o.removeprefix("+") for o in overrides])
    assert (cfg.optimizer.lr, cfg.model.depth) == (best["point"]["optimizer.lr"], best["point"]["model.depth"])
    assert (cfg.unitscale.lr_units, cfg.optimizer.weight_decay) == ("umup", 1e-4)


def test_the_learning_rate_alone_may_be_searched(tmp_path: Path) -> None:
    folder, _ = run_recipe("sweep", tmp_path, *TINY[:-1], "search=[independent]")
    assert len((folder / "runs.jsonl").read_text().splitlines()) == 2
    assert (folder / "experiment" / "chosen.yaml").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["params.unitscale=null", "params.optimizer.lr=[1]"], "the sweep is over nothing"),
        (["params.optimizer.lr=null"], "params has no values of optimizer.lr, which is searched first"),
        (["params.optimizer.lr=[-1,1]"], "optimizer.lr=-1 must be a positive number"),
        (
            ["+params.unitscale.hyperparameters.tau=[0.1,0.2]"],
            r"params.unitscale.hyperparameters.tau: there is no setting",
        ),
        (
            ["params.unitscale.hyperparameters.alpha_attn=[0,1]"],
            "alpha_attn=0 of scheme='umup' must be a number above 0",
        ),
        (["+params.model.width=[64,65]"], "model.width=65 is not a multiple of model.head_width"),
        (["search=[grid]"], "search: 'grid' is not known; choose from independent, random"),
        (["search=[]"], r"search=\[\] does nothing"),
    ],
)
def test_wrong_settings_are_named_before_any_run(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        run_recipe("sweep", tmp_path, "experiment=tiny", *overrides)
    assert not (tmp_path / "run" / "runs.jsonl").exists()


@pytest.mark.slow
def test_optuna_s_sweeper_minimises_what_pretrain_returns(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    trials = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweep.dir=trials", "monitor=none"]
    run_recipe("pretrain", tmp_path, "experiment=tiny", *trials, "optimizer.lr=choice(1e-3,2e-3)")
    found = OmegaConf.load(tmp_path / "trials" / "optimization_results.yaml")
    assert found.best_params["optimizer.lr"] in (1e-3, 2e-3)
    assert math.isfinite(found.best_value)


def test_a_setting_can_only_have_values_of_its_kind() -> None:
    cfg = OmegaConf.create({"a": {"b": 1}})
    assert with_point(cfg, (("a.b", 2),)).a.b == 2
    assert cfg.a.b == 1
    with pytest.raises(InputError, match=r"there is no setting a\.c here"):
        with_point(cfg, (("a.c", 2),))
