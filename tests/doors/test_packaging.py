"""The wheel, unpacked: recipes and configuration are found in it, and other Hydra applications find the plugin."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.fresh_python import ROOT, run_python


@pytest.fixture(scope="module")
def wheel_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an installation of the wheel puts into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    run = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "tree")
    return folder / "tree"


def python(tree: Path, cwd: Path, *arguments: str) -> str:
    """Standard output of a Python that has the unpacked wheel in front of everything."""
    return run_python(*arguments, path=[tree], cwd=cwd)


def files(folder: Path) -> set[Path]:
    return {f.relative_to(folder) for f in folder.rglob("*") if f.is_file() and f.parent.name != "__pycache__"}


def test_wheel_contents(wheel_tree: Path) -> None:
    for part in ("conf", "recipes"):
        assert files(wheel_tree / "lightning_unitscale" / part) == files(ROOT / part)
    plugins = ("hydra_plugins/lightning_unitscale.py", "hydra_plugins/unitscale_independent.py")
    for file in ("lightning_unitscale/py.typed", *plugins):
        assert (wheel_tree / file).is_file()
    top = {path.name for path in wheel_tree.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"lightning_unitscale", "lightning_unitscale_autoload.py", "hydra_plugins"}
    (metadata,) = wheel_tree.glob("*.dist-info")
    assert "unitscale = lightning_unitscale.cli:main" in (metadata / "entry_points.txt").read_text()
    assert list(metadata.rglob("LICENSE"))


COMMAND_LINE = """
import sys
from lightning_unitscale import cli
from lightning_unitscale.cookbook import config

print(config.shipped("conf"), config.shipped("recipes"))
sys.argv = ["unitscale", "--help"]
cli.main()
"""


def test_command_line_runs_from_the_wheel(wheel_tree: Path, tmp_path: Path) -> None:
    folders, shown = python(wheel_tree, tmp_path, "-c", COMMAND_LINE).split("\n", 1)
    assert folders.split() == [str(wheel_tree / "lightning_unitscale" / part) for part in ("conf", "recipes")]
    assert "  pretrain " in shown


USERS_APPLICATION = """
import hydra
from omegaconf import DictConfig

@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    callbacks = [hydra.utils.instantiate(node) for node in cfg.callbacks.values()]
    print([type(callback).__name__ for callback in callbacks], cfg.callbacks.unitscale.storage)

main()
"""


@pytest.mark.slow
def test_another_application_writes_callbacks_unitscale(tmp_path: Path, wheel_tree: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "train.yaml").write_text("defaults: [{callbacks: unitscale}, _self_]\n")
    (tmp_path / "train.py").write_text(USERS_APPLICATION)
    shown = python(wheel_tree, tmp_path, "train.py", "callbacks.unitscale.storage=unit")
    assert shown.strip() == "['UnitScaling'] unit"


NO_IMPORT = """
from pytorch_lightning import Trainer
print(type(Trainer(strategy="unitscale", logger=False, accelerator="cpu").strategy).__name__)
"""


def test_an_installed_package_needs_no_import_for_the_names_of_its_strategies(wheel_tree: Path, tmp_path: Path) -> None:
    assert python(wheel_tree, tmp_path, "-c", NO_IMPORT).split() == ["UnitScalingStrategy"]


BROKEN = {
    "missing": None,
    "raising": "raise RuntimeError('half removed')",
    "half there": "",  # no attachments.py
    "of another Python": "this is no Python",
}


@pytest.mark.parametrize("state", BROKEN)
def test_a_broken_installation_does_not_break_torch(wheel_tree: Path, tmp_path: Path, state: str) -> None:
    (metadata,) = wheel_tree.glob("*.dist-info")
    shutil.copytree(metadata, tmp_path / metadata.name)
    shutil.copy(wheel_tree / "lightning_unitscale_autoload.py", tmp_path)
    if BROKEN[state] is not None:
        (tmp_path / "lightning_unitscale").mkdir()
        (tmp_path / "lightning_unitscale" / "__init__.py").write_text(BROKEN[state])
    code = "import torch, sys; print(torch.ones(1).item(), 'lightning_unitscale_autoload' in sys.modules)"
    # -S: no .pth files, which would lead to an editable installation
    printed = run_python("-S", "-c", code, path=[tmp_path, *map(Path, site.getsitepackages())])
    assert printed.split() == ["1.0", "True"]


CHANGED_LIGHTNING = """
import warnings
from lightning_unitscale import attachments
attachments.STRATEGIES["unitscale"] = None  # no pair any more
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import pytorch_lightning
print([str(warning.message) for warning in seen if "does not fit" in str(warning.message)])
"""


def test_what_can_not_be_attached_is_a_warning(wheel_tree: Path, tmp_path: Path) -> None:
    assert "does not fit this pytorch_lightning.strategies: TypeError" in python(
        wheel_tree, tmp_path, "-c", CHANGED_LIGHTNING
    )
