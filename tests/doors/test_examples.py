"""The examples run as they are, leave nothing behind, and are no commands."""

from __future__ import annotations

import re
from pathlib import Path

from support.fresh_python import ROOT, run_python

from lightning_unitscale import cli

EXAMPLES = sorted((ROOT / "recipes" / "examples").glob("*.py"))


def output(example: str, folder: Path) -> str:
    """What an example prints, run in an empty folder."""
    file = ROOT / "recipes" / "examples" / f"{example}.py"
    printed = run_python(file, cwd=folder)
    assert not list(folder.iterdir())
    return printed


def test_plain_torch_loop(tmp_path: Path) -> None:
    losses = re.search(r"trained (\d\.\d+), loaded (\d\.\d+)$", output("plain_torch_loop", tmp_path))
    assert losses
    assert losses[1] == losses[2]
    assert float(losses[1]) < 2.8  # guessing: 5.5


def test_own_trainer(tmp_path: Path) -> None:
    printed = output("own_trainer", tmp_path)
    assert "step 200: gradients up to" in printed
    assert "learning rate ×" in printed  # the plan


def test_examples_fit_a_screen_and_are_no_commands() -> None:
    for example in EXAMPLES:
        assert len(example.read_text(encoding="utf-8").splitlines()) < 60
        assert example.stem not in cli.commands()
