"""A fresh interpreter for what a test must not do, or can't see, in its own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent


def run_python(*arguments: object, path: Sequence[Path] = (TESTS, ROOT), cwd: Path | None = None) -> str:
    """What it prints; it has to end well.

    Args:
        arguments: "-c", code and what it finds in `sys.argv`; or a file and so on.
        path: what is imported from before all else.
    """
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout
