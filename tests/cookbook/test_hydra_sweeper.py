"""Independent search as Hydra's sweeper, in an application that knows nothing of this package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import lightning_unitscale
from lightning_unitscale.cookbook.sweeps import hydra_sweeper
from lightning_unitscale.cookbook.sweeps.search import cost

APPLICATION = """
import math, hydra
from hydra.core.config_store import ConfigStore

@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    if cfg.diverges:
        return math.nan
    return sum(math.log(cfg.model[name] / best) ** 2 for name, best in (("lr", 2), ("a", 2.0), ("b", 3.0)))

ConfigStore.instance().store("config", {"model": {"lr": 1.0, "a": 1.0, "b": 1.0}, "diverges": False})
main()
"""
SPACE = ["model.lr=1,2,4", "model.a=choice(0.5,1,2)", "model.b=1,3"]


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The application, and the plugin where the wheel has it."""
    folder = tmp_path_factory.mktemp("application")
    (folder / "hydra_plugins").mkdir()
    shutil.copy(hydra_sweeper.__file__, folder / "hydra_plugins" / "unitscale_independent.py")
    (folder / "app.py").write_text(APPLICATION)
    return folder


def swept(application: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    package = Path(lightning_unitscale.__file__).parent.parent
    path = os.pathsep.join(map(str, (application, package)))
    command = [sys.executable, str(application / "app.py"), "-m", "hydra/sweeper=unitscale_independent", *arguments]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )


def test_it_finds_the_best_in_as_many_runs_as_the_search_costs(application: Path, tmp_path: Path) -> None:
    done = swept(application, tmp_path, *SPACE, "hydra.sweep.dir=out")
    assert done.returncode == 0, done.stderr
    found = OmegaConf.load(tmp_path / "out" / "optimization_results.yaml")
    assert found.best_params == {"model.lr": 2, "model.a": 2, "model.b": 3}
    assert found.best_value == 0
    runs = [folder for folder in (tmp_path / "out").iterdir() if folder.is_dir()]
    assert len(runs) == cost({"lr": [1, 2, 4], "a": [0.5, 1, 2], "b": [1, 3]}) == 7
    phases = [line.rpartition("] ")[2] for line in done.stdout.splitlines() if " runs" in line]
    assert phases == ["rate: 3 runs", "alone: 3 runs", "combined: 1 runs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.lr=1"], "give it several values"),
        (["model.lr=1,2", "model.a=interval(0.5,2)"], "needs single values, not an interval: model.a=interval"),
        (["model.lr=1,2", "+model.new=1,2"], "+model.new has no value of its own to begin with"),
        ([*SPACE, "diverges=true"], "with none of model.lr=1,2,4 does the model train"),
    ],
)
def test_what_cannot_be_searched_is_named(
    arguments: list[str], message: str, application: Path, tmp_path: Path
) -> None:
    done = swept(application, tmp_path, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
