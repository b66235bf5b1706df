"""`unitscale init`: the project that it writes trains at once, with unit scaling and without."""

from __future__ import annotations

import os
import runpy
import subprocess
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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_step=3", "error: there is no setting trainer.max_step here. Did you mean trainer.max_steps"),
        ("modul.width=3", "error: there is no setting modul.width here. Did you mean module.width?"),
        ("callbacks=unitscal", "error: callbacks=unitscal is not known; choose one of scale_monitor, unitscale."),
        ("callbacks.unitscale.scheme=umpu", "error: scheme='umpu' is not known; choose one of "),
    ],
)
def test_a_misspelt_setting_of_the_project_is_named_with_the_near_one(
    override: str, message: str, project: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "train.py", override]
    run = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert message in run.stderr and "Traceback" not in run.stderr and "HYDRA_FULL_ERROR" not in run.stderr


def test_the_end_of_each_file_is_held_out_from_training(project: Path) -> None:
    for name in "ab":
        (project / f"{name}.txt").write_bytes(name.encode() * 90 + name.upper().encode() * 10)
    data = runpy.run_path(str(project / "data.py"))["TextFiles"](str(project), "*.txt", length=2, batch_size=4)
    data.setup("fit")
    assert bytes(data.training.text) == b"a" * 90 + b"b" * 90
    assert bytes(data.held_out.text) == b"A" * 10 + b"B" * 10


def test_what_the_project_holds_out_is_text_to_read(project: Path) -> None:
    data = runpy.run_path(str(project / "data.py"))["TextFiles"](None, "*.py", length=129, batch_size=16)
    data.setup("fit")
    measured = bytes(data.held_out.text[: 20 * 16 * 129]).decode(errors="replace")  # by the project's validations
    numbers = [line for line in measured.splitlines() if sum(map(str.isdigit, line)) > len(line) / 3 > 3]
    assert len(numbers) < len(measured.splitlines()) / 100


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
