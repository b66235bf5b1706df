"""`unitscale init`: the project that it writes trains at once, with unit scaling and without."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.fresh_python import ROOT, run_python

from lightning_unitscale import cli

SMALL = ["module.width=16", "module.depth=1", "module.heads=2", "data.length=17", "data.batch_size=4"]
SHORT = ["trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.limit_val_batches=1", "hydra.run.dir=run"]


def init(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["unitscale", "init", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    cli.main()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    init(monkeypatch, str(tmp_path / "mine"))
    return tmp_path / "mine"


def train(project: Path, *overrides: str) -> str:
    return run_python("train.py", *SMALL, *SHORT, *overrides, path=[ROOT], cwd=project)


def test_the_project_trains_at_once(project: Path) -> None:
    printed = train(project)
    assert "learning rate ×" in printed  # the plan
    assert "held-out loss" in printed
    assert {file.name for file in (project / "run").glob("*.ckpt")} == {"best.ckpt", "last.ckpt"}


@pytest.mark.slow
def test_a_run_that_ends_before_its_first_validation_has_a_loss_too(project: Path) -> None:
    assert "held-out loss" in train(project, "trainer.val_check_interval=100")


@pytest.mark.slow
def test_the_project_trains_untouched_and_goes_on(project: Path) -> None:
    assert "learning rate ×" not in train(project, "~callbacks.unitscale")
    longer = train(project, "~callbacks.unitscale", "ckpt_path=run/last.ckpt", "trainer.max_steps=6")
    assert "held-out loss" in longer


@pytest.mark.slow
def test_the_project_takes_files_and_options_of_ones_own(project: Path) -> None:
    texts = project / "texts" / "deep"
    texts.mkdir(parents=True)
    (texts / "a.txt").write_text("abc " * 1000)
    own = ["data.folder=texts", 'data.pattern="**/*.txt"', "callbacks.unitscale.format=fp8"]
    assert "fp8" in train(project, *own)


def test_a_folder_with_files_is_left_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "module.py").write_text("mine")
    with pytest.raises(SystemExit, match="is there already"):
        init(monkeypatch, str(project))
    assert (project / "module.py").read_text() == "mine"


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["folder=a"]])
def test_anything_but_a_folder_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="unitscale init my_project"):
        init(monkeypatch, *arguments)
    assert not list(tmp_path.iterdir())
