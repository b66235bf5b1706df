"""Running a recipe as the command does, inside the test process."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from lightning_unitscale import cli


def run_recipe(command: str, folder: Path, *arguments: str) -> tuple[Path, str]:
    """`unitscale <command> <arguments>` in `folder`: the run folder, and what was printed.

    Raises:
        SystemExit: with the message that the command would print.
    """
    GlobalHydra.instance().clear()
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["unitscale", command, "hydra.run.dir=run", *arguments])
        patch.setattr(sys, "path", list(sys.path))
        cli.main()
    return folder / "run", printed.getvalue()
