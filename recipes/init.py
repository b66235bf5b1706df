"""Write a small project of your own: LightningModule, data, and a Hydra configuration with the callback.

unitscale init my_project
cd my_project && python train.py    # trains at once, on text that is on every machine
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_unitscale.cookbook.config import shipped
from lightning_unitscale.errors import InputError


def main(arguments: Sequence[str]) -> None:
    """Copies `recipes/template`.

    Raises:
        InputError: no folder is named, or there are files in it.
    """
    if len(arguments) != 1 or "=" in arguments[0] or arguments[0].startswith("-"):
        raise InputError("say the new folder, and nothing else: unitscale init my_project")
    folder = Path(arguments[0]).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already, and not an empty folder; choose another")
    shutil.copytree(
        shipped("recipes") / "template", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
    )
    for file in sorted(folder.rglob("*.*")):
        print(file)
    print(f"\ncd {folder} && python train.py")


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(__doc__)
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
