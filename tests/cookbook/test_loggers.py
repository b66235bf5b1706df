"""Loggers that send nothing anywhere: what a run leaves on this machine. Skipped where the logger's package is missing.

(CSV and TensorBoard, the default, are looked at in test_pretrain.)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support.fresh_python import run_python
from support.recipe_runs import run_recipe


def logged(logger: str, folder: Path, *arguments: str) -> tuple[Path, float]:
    """The folder of a tiny run, and its held-out loss."""
    run, _ = run_recipe("pretrain", folder, "experiment=tiny", f"logger={logger}", *arguments)
    assert (run / "csv" / "metrics.csv").stat().st_size > 0  # the curves of the report
    return run, json.loads((run / "report" / "metrics.json").read_text())["val/loss"]


@pytest.mark.parametrize("logger", ["wandb", "many"])
def test_weights_and_biases_offline(logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    run, _ = logged(logger, tmp_path, "logger.wandb.offline=true")
    wandb.finish()
    (kept,) = run.glob("wandb/offline-run-*/*.wandb")
    content = kept.read_bytes()
    assert all(name in content for name in (b"train/loss", b"val/loss", b"unitscale/"))
    if logger == "many":
        assert list((run / "tensorboard").glob("events*"))


def test_mlflow_in_a_file(tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    _, loss = logged("mlflow", tmp_path)
    client = tracking.MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'pretrain'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.metrics["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert found.info.status == "FINISHED"


def test_aim_in_a_folder(tmp_path: Path) -> None:
    aim = pytest.importorskip("aim")
    _, loss = logged("aim", tmp_path)
    reindex = "import sys; from aim.cli.cli import cli_entry_point; cli_entry_point(sys.argv[1:])"
    run_python("-c", reindex, "storage", "--repo", tmp_path, "reindex", "--yes")  # as `aim up` does while it runs
    (found,) = aim.Repo(str(tmp_path)).iter_runs()
    values = [values.values_list() for metric in found.metrics() if (values := metric.values) and "loss" in metric.name]
    assert any(value == pytest.approx(loss, rel=1e-5) for series in values for value in series)


def test_a_logger_whose_package_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("aim", "aim.pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match="needs the package aim, which is not installed: pip install aim"):
        run_recipe("pretrain", tmp_path, "experiment=tiny", "logger=aim")


def test_without_a_logger_a_run_writes_its_report_all_the_same(tmp_path: Path) -> None:
    run, _ = run_recipe("pretrain", tmp_path, "experiment=tiny", "logger=none")
    assert not (run / "csv").exists()
    assert (run / "report" / "index.html").is_file()
    assert json.loads((run / "report" / "metrics.json").read_text())["val/loss"] > 0
